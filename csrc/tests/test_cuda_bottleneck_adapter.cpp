// The CUDA kernels of the bottleneck adapter, their sources run on the emulator, against plain loops in double.
#define PETL_EMULATE
#include "testing.h"

#include "../cuda/bottleneck_adapter.cu"
#include "cuda_bottleneck_adapter.h"

namespace {

void run(const AdapterSizes& s, const DeviceOptions& o) {
  const DeviceAdapter adapter{petl::cuda::bottleneck_forward, petl::cuda::bottleneck_workspace,
                              petl::cuda::bottleneck_backward, 4};
  run_adapter(adapter, s, o);
}

// Dropout of ones, and nothing else: the bits of the CPU kernel. Where rows need more than 34 bits, those of the generator.
void run_masks(int64_t n, int64_t r, double p) {
  Stored eye(r, r, DType::kFloat32), ones(n, r, DType::kFloat32);
  for (int64_t i = 0; i < std::max(n, r); ++i) {
    for (int64_t k = 0; k < r; ++k) {
      if (i < n) ones.put(i, k, 1);
      if (i < r) eye.put(i, k, i == k);
    }
  }
  for (const int64_t seed : {INT64_C(0), INT64_C(-1), INT64_MAX, INT64_MIN, INT64_C(0x123456789abcdef)}) {
    Stored want(n, r, DType::kFloat32), got(n, r, DType::kFloat32);
    BottleneckForward call{n, r, r, r, ones.rows(), eye.rows(), Rows{}, eye.rows(), Rows{}, Rows{}, Rows{}, Rows{}, 0,
                           {&seed, p}, 1, Activation::kIdentity, want.rows(), Rows{}, 2};
    kernels().bottleneck_forward(call);
    call.y = got.rows();
    petl::cuda::bottleneck_forward(call, {0, nullptr, 2, 99 * 1024, false});
    expect(want.bytes == got.bytes, text("dropout ", p, " of ", n, " x ", r, ", seed ", seed, ": not the CPU's"));
    for (int64_t row = 0; row < 8; ++row) {
      const auto far = static_cast<uint64_t>(1) << 40, key = static_cast<uint64_t>(seed);
      const bool kept = petl::cuda::kept_of_four(key, 5, far + static_cast<uint64_t>(row) / 4, 1 << 30) >> row % 4 & 1;
      expect(kept == philox(key, static_cast<int64_t>(4 * far) + row, 5) >> 31, text("dropout of far rows, seed ", seed));
    }
  }
}

// Dropout, softmax and gate, one by one and together.
void run_modified(AdapterSizes s, DeviceOptions o) {
  const auto with = [&](double dropout, bool gated, bool softmax) {
    DeviceOptions some(o);
    some.dropout = dropout, some.gated = gated;
    if (softmax) some.activation = Activation::kSoftmax;
    run(s, some);
  };
  with(0.3, false, false), with(0, true, false), with(0, false, true), with(0.6, true, true);
}

}  // namespace

int main() {
  constexpr DType kSingle = DType::kFloat32, kBrain = DType::kBFloat16, kHalf = DType::kFloat16;
  // Nothing divides anything; rows on 16 bytes (of 200 and 136 elements) and not; blocks of 64 rows and of 32.
  const AdapterSizes sizes[] = {{1, 1, 1, 1, 0}, {33, 64, 16, 64, 0}, {70, 200, 24, 200, 8}, {130, 97, 33, 97, 0}};
  for (const AdapterSizes& s : sizes) {
    for (const DType dtype : {kSingle, kBrain, kHalf}) run(s, options(dtype, dtype));
  }
  DeviceOptions grouped = options(kSingle, kSingle, Activation::kGelu, 1);
  grouped.processors = 4;  // three groups of rows, whose sums of the weights' gradients are added up
  run({200, 24, 8, 24, 0}, grouped);
  for (const DType weights : {kSingle, kHalf}) {  // converted as they are loaded
    DeviceOptions mixed = options(kBrain, weights, Activation::kSilu, 1);
    mixed.sequential = false;
    run({45, 72, 20, 56, 1}, mixed);
  }
  for (int a = 0; a <= static_cast<int>(Activation::kIdentity); ++a) {
    run({35, 40, 12, 40, 0}, options(kSingle, kSingle, static_cast<Activation>(a), a % 2 ? 1 : 40));
  }
  DeviceOptions fast = options(kSingle, kSingle);
  fast.fast = true;
  run({35, 72, 40, 72, 0}, fast);
  for (const DType dtype : {kSingle, kBrain}) {  // wide bottlenecks; rows that stay and that do not fit
    run({70, 136, 224, 136, 0}, options(dtype, dtype, Activation::kGelu, 136));
    DeviceOptions large = options(dtype, dtype);
    large.shared_bytes = 227 * 1024;
    run({129, 776, 65, 776, 0}, large);
    large.shared_bytes = 48 * 1024;
    run({65, 776, 8, 776, 0}, large);
  }
  for (const char* only : {"dx", "dw_down", "db_down", "dw_up", "db_up", "dscale", "dgate", "nothing"}) {
    for (const int64_t scale_size : {1, 72}) {
      DeviceOptions some = options(kBrain, kSingle, Activation::kTanh, scale_size);
      some.only = only, some.gated = std::string(only) == "dgate";
      run({37, 72, 12, 72, 0}, some);
      some.gated = true, some.dropout = 0.25;
      if (scale_size > 1) run({37, 72, 12, 72, 0}, some);
    }
  }
  run_masks(67, 37, 0.5), run_masks(9, 200, 0.75), run_masks(33, 5, 1e-9);
  for (const int64_t scale_size : {0, 1}) {
    run_modified({1, 1, 1, 1, 0}, options(kSingle, kSingle, Activation::kGelu, scale_size));
    run_modified({33, 64, 16, 64, 0}, options(kHalf, kHalf, Activation::kSilu, scale_size));
  }
  run_modified({130, 97, 33, 97, 3}, options(kSingle, kSingle, Activation::kTanh, 97));  // blocks of 64 rows
  DeviceOptions parallel = options(kBrain, kSingle, Activation::kRelu, 56);
  parallel.sequential = false;
  run_modified({66, 72, 70, 56, 1}, parallel);
  for (const DType dtype : {kSingle, kHalf}) run_modified({37, 40, 224, 40, 0}, options(dtype, dtype, Activation::kGelu, 1));
  return finish();
}
