// What the bindings and the tests call. The structs are those of the CPU kernels (petl.h), of which `threads` is unused;
// everything else that a launch needs is in Launch. Nothing here allocates, synchronises or asks the device: calls can be
// captured in a CUDA graph.
#pragma once

#include "../petl.h"

namespace petl::cuda {

struct Launch {
  int device;
  void* stream;          // a cudaStream_t
  int processors;        // of the device: how much work fills it
  int64_t shared_bytes;  // that a block may have there
  bool fast;             // products of floats in tf32
};

// Throw std::invalid_argument where the bottleneck is too wide: more than 256, of floats 224 in 99 KiB.
void bottleneck_forward(const BottleneckForward& call, const Launch& launch);
// `workspace` is as long as `bottleneck_workspace` says and begins on 16 bytes.
int64_t bottleneck_workspace(const BottleneckBackward& call, const Launch& launch);
void bottleneck_backward(const BottleneckBackward& call, const Launch& launch, void* workspace);

// The same on wgmma, TMA and clusters, for devices of compute capability 9.0 and 16-bit dtypes. Throw std::invalid_argument
// where a call is not for them: r is at most 64, rows are on 16 bytes and those of a block fit its shared memory.
void bottleneck_forward_sm90(const BottleneckForward& call, const Launch& launch);
// d is at most 1024. z is of the dtype of g; weights may be of any.
int64_t bottleneck_workspace_sm90(const BottleneckBackward& call, const Launch& launch);
void bottleneck_backward_sm90(const BottleneckBackward& call, const Launch& launch, void* workspace);

// The adapter with a norm behind it or in front; which tensors a call has is the CPU kernels' affair too, mean and rstd are
// float32, and x, z and dx have one dtype, of norm_adapter everything that is rows. Throw as bottleneck_forward. Workspace,
// on 16 bytes, is wanted by a forward whose rows do not fit shared memory.
int64_t adapter_norm_forward_workspace(const AdapterNormForward& call, const Launch& launch);
void adapter_norm_forward(const AdapterNormForward& call, const Launch& launch, void* workspace);
int64_t adapter_norm_workspace(const AdapterNormBackward& call, const Launch& launch);
void adapter_norm_backward(const AdapterNormBackward& call, const Launch& launch, void* workspace);
int64_t norm_adapter_forward_workspace(const NormAdapterForward& call, const Launch& launch);
void norm_adapter_forward(const NormAdapterForward& call, const Launch& launch, void* workspace);
int64_t norm_adapter_workspace(const NormAdapterBackward& call, const Launch& launch);
void norm_adapter_backward(const NormAdapterBackward& call, const Launch& launch, void* workspace);

// Throw std::invalid_argument beyond 384 channels.
void channel_adapter_forward(const ChannelAdapterForward& call, const Launch& launch);
int64_t channel_adapter_workspace(const ChannelAdapterBackward& call, const Launch& launch);
void channel_adapter_backward(const ChannelAdapterBackward& call, const Launch& launch, void* workspace);

int64_t channel_gradient_workspace(const ChannelGradient& call, const Launch& launch);
void channel_gradient(const ChannelGradient& call, const Launch& launch, void* workspace);

int64_t channel_importance_workspace(const ChannelImportance& call, const Launch& launch);
void channel_importance(const ChannelImportance& call, const Launch& launch, void* workspace);

// A step over many tensors in one launch: what `petl_kernels.ops._channel_step_device` keeps on the device.
struct DeviceStep {
  const int64_t* rows;      // a row of fields per tensor (petl_kernels.ops._channel_step.FIELDS)
  const double* numbers;    // six hyper-parameters per tensor
  const int64_t* programs;  // per block the tensor it updates, and that tensor's first block
  int64_t count;            // blocks
  const float *grad_scale, *found_inf;
};
void channel_adamw(const DeviceStep& call, const Launch& launch);
void channel_sgd(const DeviceStep& call, const Launch& launch);

}  // namespace petl::cuda
