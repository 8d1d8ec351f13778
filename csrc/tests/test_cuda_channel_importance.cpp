// The CUDA kernels of channel_importance, their sources run on the emulator, against a plain loop in double.
#define PETL_EMULATE
#include "testing.h"

#include "../cuda/channel_importance.cu"

namespace {

struct Sizes {
  int64_t samples, sample_rows, d, gap;
};

void run(const Sizes& s, Reduction reduction, DType a_dtype, DType g_dtype) {
  std::mt19937 rng(static_cast<unsigned>(s.samples * 31 + s.sample_rows * 7 + s.d));
  const int64_t n = s.samples * s.sample_rows;
  Stored a(rng, n, s.d, a_dtype, s.gap), g(rng, n, s.d, g_dtype), scores(1, s.d, DType::kFloat32);
  const ChannelImportance call{n, s.d, s.sample_rows, a.rows(), g.rows(), reduction, scores.rows(), 0};
  const petl::cuda::Launch launch{0, nullptr, 3, 99 * 1024, false};
  const int64_t bytes = petl::cuda::channel_importance_workspace(call, launch);
  std::vector<double> workspace(static_cast<size_t>(bytes) / sizeof(double), NAN);
  petl::cuda::channel_importance(call, launch, workspace.data());
  for (int64_t c = 0; c < s.d; ++c) {
    double sum = 0, absolute = 0, squares = 0;
    for (int64_t i = 0; i < s.samples; ++i) {
      double sample = 0;
      for (int64_t j = 0; j < s.sample_rows; ++j) {
        const double product = a(i * s.sample_rows + j, c) * g(i * s.sample_rows + j, c);
        sample += product;
        absolute += std::abs(product);
      }
      sum += sample;
      squares += sample * sample;
    }
    const double wanted = reduction == Reduction::kAbs ? absolute : reduction == Reduction::kSqBatch ? sum * sum : squares;
    if (!(std::abs(scores(0, c) - wanted) <= 1e-7 * (absolute * absolute + 1))) {
      return expect(false, text(s.samples, "x", s.sample_rows, "x", s.d, " ", dtype_name(a_dtype), " reduction ",
                                static_cast<int>(reduction), ", channel ", c, ": got ", scores(0, c), ", wanted ", wanted));
    }
  }
}

}  // namespace

int main() {
  const Sizes sizes[] = {{1, 1, 1, 0}, {3, 5, 16, 0}, {17, 1, 33, 7}, {2, 300, 100, 4}, {9, 2, 136, 1}, {400, 7, 130, 0}};
  constexpr DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  for (const Sizes& s : sizes) {
    for (Reduction reduction : {Reduction::kSqBatch, Reduction::kSqSample, Reduction::kAbs}) {
      for (const DType dtype : {f32, bf16, f16}) run(s, reduction, dtype, dtype);
      run(s, reduction, bf16, f32);
    }
  }
  std::printf("%s\n", failures ? "FAILED" : "passed");
  return failures ? 1 : 0;
}
