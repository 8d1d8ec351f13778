// The kernels of one instruction set, and the choice between the sets that were built.
#pragma once

#include <string>
#include <vector>

#include "../petl.h"

namespace petl {

struct Kernels {
  const char* isa;
  void (*bottleneck_forward)(const BottleneckForward&);
  void (*bottleneck_backward)(const BottleneckBackward&);
};

// Those of the active instruction set: the widest that was built and that this processor has, or what `set_isa` chose.
const Kernels& kernels();

std::vector<std::string> built_isas();  // narrowest first
std::vector<std::string> isas();        // those among them that this processor can run
void set_isa(const std::string& name);  // throws std::invalid_argument for any other

}  // namespace petl
