// The CUDA kernels of channel_importance, their sources run on the emulator, against a plain loop in double.
#define PETL_EMULATE
#include "channel_importance.h"

#include "../cuda/channel_importance.cu"

namespace {

void run(const SampleSizes& s, Reduction reduction, DType a_dtype, DType g_dtype) {
  std::mt19937 rng(static_cast<unsigned>(s.samples * 31 + s.sample_rows * 7 + s.d));
  const int64_t n = s.samples * s.sample_rows;
  Stored a(rng, n, s.d, a_dtype, s.gap), g(rng, n, s.d, g_dtype), scores(1, s.d, DType::kFloat32);
  const ChannelImportance call{n, s.d, s.sample_rows, a.rows(), g.rows(), reduction, scores.rows(), 0};
  const petl::cuda::Launch launch{0, nullptr, 3, 99 * 1024, false};
  const int64_t bytes = petl::cuda::channel_importance_workspace(call, launch);
  std::vector<double> workspace(static_cast<size_t>(bytes) / sizeof(double), NAN);
  petl::cuda::channel_importance(call, launch, workspace.data());
  compare_scores(text(dtype_name(a_dtype), " "), s, reduction, a, g, scores, 1e-7);
}

}  // namespace

int main() {
  const SampleSizes sizes[] = {{1, 1, 1, 0}, {3, 5, 16, 0}, {17, 1, 33, 7}, {2, 300, 100, 4}, {9, 2, 136, 1}, {400, 7, 130, 0}};
  constexpr DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  for (const SampleSizes& s : sizes) {
    for (Reduction reduction : {Reduction::kSqBatch, Reduction::kSqSample, Reduction::kAbs}) {
      for (const DType dtype : {f32, bf16, f16}) run(s, reduction, dtype, dtype);
      run(s, reduction, bf16, f32);
    }
  }
  return finish();
}
