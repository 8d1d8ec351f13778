// Every instruction set this processor has against a plain loop in double, on buffers of the exact size, so that the
// sanitizers see a read past the end.
#include "testing.h"

namespace {

struct Sizes {
  int64_t samples, sample_rows, d, gap;
};

void run(const std::string& isa, Sizes s, Reduction reduction, int threads, DType dtype, double tolerance) {
  std::mt19937 rng(static_cast<unsigned>(s.samples * 31 + s.sample_rows * 7 + s.d));
  const int64_t n = s.samples * s.sample_rows;
  Stored a(rng, n, s.d, dtype, s.gap), g(rng, n, s.d, dtype), scores(1, s.d, dtype);
  kernels().channel_importance({n, s.d, s.sample_rows, a.rows(), g.rows(), reduction, scores.rows(), threads});
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
    if (!(std::abs(scores(0, c) - wanted) <= tolerance * (absolute * absolute + 1))) {
      return expect(false, text(isa, " ", s.samples, "x", s.sample_rows, "x", s.d, " reduction ",
                                static_cast<int>(reduction), ", ", threads, " threads, channel ", c, ": got ",
                                scores(0, c), ", wanted ", wanted));
    }
  }
}

}  // namespace

int main() {
  const Sizes sizes[] = {{1, 1, 1, 0}, {3, 5, 16, 0}, {17, 1, 33, 7}, {2, 300, 100, 3}, {9, 2, 768, 1}, {400, 7, 130, 0}};
  return in_every_isa([&](const std::string& isa) {
    for (const Sizes& s : sizes) {
      for (Reduction reduction : {Reduction::kSqBatch, Reduction::kSqSample, Reduction::kAbs}) {
        for (int threads : {1, 3}) {
          run(isa, s, reduction, threads, DType::kFloat32, 1e-7);
          run(isa, s, reduction, threads, DType::kFloat64, 1e-15);
        }
      }
    }
  });
}
