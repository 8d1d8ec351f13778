// The kernels of one instruction set, and the choice between the sets that were built.
#pragma once

#include <string>
#include <vector>

#include "../petl.h"

// Every kernel and the struct that it takes (petl.h).
#define PETL_KERNELS(_) \
  _(adapter_bank_forward, AdapterBankForward) \
  _(adapter_bank_backward, AdapterBankBackward) \
  _(adapter_norm_forward, AdapterNormForward) \
  _(adapter_norm_backward, AdapterNormBackward) \
  _(bottleneck_forward, BottleneckForward) \
  _(bottleneck_backward, BottleneckBackward) \
  _(channel_adamw, ChannelStep<AdamWOptions>) \
  _(channel_adapter_forward, ChannelAdapterForward) \
  _(channel_adapter_backward, ChannelAdapterBackward) \
  _(channel_gradient, ChannelGradient) \
  _(channel_importance, ChannelImportance) \
  _(channel_scale_forward, ChannelScaleForward) \
  _(channel_scale_backward, ChannelScaleBackward) \
  _(channel_sgd, ChannelStep<SGDOptions>) \
  _(layer_norm_forward, LayerNormForward) \
  _(layer_norm_backward, LayerNormBackward) \
  _(norm_adapter_forward, NormAdapterForward) \
  _(norm_adapter_backward, NormAdapterBackward)

namespace petl {

struct Kernels {
  const char* isa;
#define PETL_POINTER(name, Call) void (*name)(const Call&);
  PETL_KERNELS(PETL_POINTER)
#undef PETL_POINTER
};

// Those of the active instruction set: the widest that was built and that this processor has, or what `set_isa` chose.
const Kernels& kernels();

std::vector<std::string> built_isas();  // narrowest first
std::vector<std::string> isas();        // those among them that this processor can run
void set_isa(const std::string& name);  // throws std::invalid_argument for any other

}  // namespace petl
