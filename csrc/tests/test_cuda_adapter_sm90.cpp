// The bottleneck adapter on wgmma, TMA and clusters, its source run on the emulator, against plain loops in double. Rows
// must be on 16 bytes.
#define PETL_EMULATE
#include "testing.h"

#include "../cuda/adapter_sm90.cu"
#include "cuda_bottleneck_adapter.h"

namespace {

std::vector<unsigned char> run(const AdapterSizes& s, const DeviceOptions& o) {
  const DeviceAdapter adapter{petl::cuda::bottleneck_forward_sm90, petl::cuda::bottleneck_workspace_sm90,
                              petl::cuda::bottleneck_backward_sm90, 2};
  return run_adapter(adapter, s, o);
}

DeviceOptions hopper(DType dtype, Activation activation, int64_t scale_size, int processors) {
  DeviceOptions o = options(dtype, dtype, activation, scale_size);
  o.shared_bytes = 227 * 1024, o.processors = processors;
  return o;
}

}  // namespace

int main() {
  constexpr DType brain = DType::kBFloat16, half = DType::kFloat16;
  // One cluster with more tiles than its ring has places; five and three, whose tree is lopsided; other residuals.
  run({1, 8, 8, 8, 0}, hopper(half, Activation::kGelu, 0, 132));
  run({270, 136, 64, 136, 0}, hopper(brain, Activation::kGelu, 1, 2));
  const DeviceOptions same = hopper(half, Activation::kTanh, 200, 10);
  const auto bits = run({270, 200, 24, 200, 8}, same);
  petl::cuda::emulator::machine.last_first = true;  // other clusters are the later ones: not a bit changes
  expect(run({270, 200, 24, 200, 8}, same) == bits, "the order of clusters shows");
  petl::cuda::emulator::machine.last_first = false;
  for (const bool wide : {false, true}) {
    DeviceOptions other = hopper(brain, Activation::kSilu, wide ? 328 : 1, 132);
    other.sequential = false;
    run(wide ? AdapterSizes{130, 72, 16, 328, 8} : AdapterSizes{130, 264, 40, 72, 0}, other);
  }
  DeviceOptions small = hopper(brain, Activation::kGelu, 0, 132);
  small.shared_bytes = 48 * 1024;  // two stages
  run({66, 136, 32, 136, 0}, small);
  for (const char* only : {"dx", "dw_down", "db_down", "dw_up", "db_up", "dscale", "nothing"}) {
    DeviceOptions some = hopper(half, Activation::kGelu, only[2] == 'c' ? 72 : 1, 132);
    some.only = only;
    run({130, 72, 8, 72, 0}, some);
  }
  return finish();
}
