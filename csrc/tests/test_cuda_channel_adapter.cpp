// The CUDA kernels of the channel adapter, their sources run on the emulator.
#define PETL_EMULATE
#include "channel_adapter.h"

#include "../cuda/channel_adapter.cu"

namespace {

const petl::cuda::Launch kLaunch{0, nullptr, 3, 99 * 1024, false};

void run(ChannelSizes s, DType dtype, DType weights, bool scale_input, bool learned) {
  const auto forward = [](const ChannelAdapterForward& call) { petl::cuda::channel_adapter_forward(call, kLaunch); };
  const auto backward = [](const ChannelAdapterBackward& call) {
    std::vector<unsigned char> workspace(static_cast<size_t>(petl::cuda::channel_adapter_workspace(call, kLaunch)), 0xff);
    petl::cuda::channel_adapter_backward(call, kLaunch, workspace.data());
  };
  run_channel_adapter("cuda", s, dtype, weights, scale_input, learned, 0, forward, backward);
}

}  // namespace

int main() {
  constexpr DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  for (const ChannelSizes& s : {ChannelSizes{1, 1, 1, 0}, {1, 16, 0, 0}, {17, 48, 24, 8}, {70, 100, 65, 1}}) {
    for (const bool scale_input : {false, true}) {
      for (const DType dtype : {f32, bf16, f16}) run(s, dtype, dtype, scale_input, dtype == f32);
      run(s, bf16, f32, scale_input, true);
    }
  }
  run({20, 400, 384, 0}, f32, f32, false, false);  // one slab of weights at a time
  expect(petl::cuda::emulator::machine.counters.collisions == 0, "bank conflicts");
  return finish();
}
