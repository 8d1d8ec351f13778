// A call of the CUDA bottleneck adapter on the emulator, by the kernels that the caller names, against plain loops in
// double. To be included behind the kernels' sources.
#pragma once

#include "bottleneck_adapter.h"

struct DeviceAdapter {
  decltype(&petl::cuda::bottleneck_forward) forward;
  decltype(&petl::cuda::bottleneck_workspace) workspace;
  decltype(&petl::cuda::bottleneck_backward) backward;
  int64_t most_launches;  // of both directions
};

struct DeviceOptions : AdapterOptions {
  bool fast = false;
  int processors = 2;
  int64_t shared_bytes = 99 * 1024;  // what sm_86 and sm_120 have; the least of all
};

inline DeviceOptions options(DType dtype, DType weights, Activation activation = Activation::kGelu, int64_t scale_size = 0) {
  DeviceOptions o;
  o.dtype = dtype, o.weights = weights, o.activation = activation, o.scale_size = scale_size;
  o.alpha = 0.25;  // weights of the size that training begins with, so that activations are neither flat nor the identity
  return o;
}

// Returns the bits of the weights' gradients.
inline std::vector<unsigned char> run_adapter(const DeviceAdapter& adapter, const AdapterSizes& s, const DeviceOptions& o) {
  AdapterCase call(s, o);
  const petl::cuda::Launch launch{0, nullptr, o.processors, o.shared_bytes, o.fast};
  auto& counters = petl::cuda::emulator::machine.counters;
  counters = {};
  adapter.forward(call.forward(0), launch);
  const int64_t forward_launches = counters.launches;
  const BottleneckBackward back = call.backward(0);
  std::vector<unsigned char> workspace(static_cast<size_t>(adapter.workspace(back, launch)), 0xff);
  adapter.backward(back, launch, workspace.data());

  // The gradient of a scalar is what remains of thousands of products, each of factors that were rounded, of either sign.
  // Of a softmax dz is the difference of terms that were rounded.
  call.check("", (o.fast ? 2e-3 : tolerance(o.dtype)) * (o.activation == Activation::kSoftmax ? 2 : 1), 4);
  expect(forward_launches == 1 && counters.launches <= adapter.most_launches, call.name() + "launches");
  expect(counters.collisions == 0, text(call.name(), "bank conflicts: ", counters.collisions));
  return call.weight_gradients();
}
