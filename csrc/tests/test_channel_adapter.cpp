// Every instruction set this processor has, on buffers of the exact size, so that the sanitizers see a read or write past
// the end.
#include "channel_adapter.h"

namespace {

void run(const std::string& isa, ChannelSizes s, DType dtype, DType weights, bool scale_input, bool learned, int threads) {
  run_channel_adapter(isa, s, dtype, weights, scale_input, learned, threads, kernels().channel_adapter_forward,
                      kernels().channel_adapter_backward);
}

}  // namespace

int main() {
  const ChannelSizes sizes[] = {{1, 1, 1, 0},     {1, 16, 0, 0},   {5, 33, 3, 7},   {14, 32, 32, 0},  {17, 48, 24, 3},
                                {29, 100, 33, 0}, {97, 64, 64, 1}, {211, 31, 5, 0}, {40, 300, 290, 0}};
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  return in_every_isa([&](const std::string& isa) {
    for (const ChannelSizes& s : sizes) {
      for (const bool scale_input : {false, true}) {
        run(isa, s, DType::kFloat64, DType::kFloat64, scale_input, true, 1);
        for (DType dtype : dtypes) run(isa, s, dtype, dtype, scale_input, false, 2);
        run(isa, s, DType::kBFloat16, DType::kFloat32, scale_input, true, 3);
      }
    }
  });
}
