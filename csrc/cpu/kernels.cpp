// The table of kernels of one instruction set; compiled, like the kernels, once per set.
#include "kernels.h"

#define PETL_STRING_(name) #name
#define PETL_STRING(name) PETL_STRING_(name)

namespace petl::PETL_ISA {

void bottleneck_forward(const BottleneckForward& call);
void bottleneck_backward(const BottleneckBackward& call);

extern const Kernels kernels;
const Kernels kernels = {PETL_STRING(PETL_ISA), bottleneck_forward, bottleneck_backward};

}  // namespace petl::PETL_ISA
