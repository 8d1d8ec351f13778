// Every instruction set this processor has against a plain loop in double, on buffers of the exact size, so that the
// sanitizers see a read past the end.
#include "channel_importance.h"

namespace {

void run(const std::string& isa, const SampleSizes& s, Reduction reduction, int threads, DType dtype, double tolerance) {
  std::mt19937 rng(static_cast<unsigned>(s.samples * 31 + s.sample_rows * 7 + s.d));
  const int64_t n = s.samples * s.sample_rows;
  Stored a(rng, n, s.d, dtype, s.gap), g(rng, n, s.d, dtype), scores(1, s.d, dtype);
  kernels().channel_importance({n, s.d, s.sample_rows, a.rows(), g.rows(), reduction, scores.rows(), threads});
  compare_scores(text(isa, " ", threads, " threads, "), s, reduction, a, g, scores, tolerance);
}

}  // namespace

int main() {
  const SampleSizes sizes[] = {{1, 1, 1, 0}, {3, 5, 16, 0}, {17, 1, 33, 7}, {2, 300, 100, 3}, {9, 2, 768, 1}, {400, 7, 130, 0}};
  return in_every_isa([&](const std::string& isa) {
    for (const SampleSizes& s : sizes) {
      for (Reduction reduction : {Reduction::kSqBatch, Reduction::kSqSample, Reduction::kAbs}) {
        for (int threads : {1, 3}) {
          run(isa, s, reduction, threads, DType::kFloat32, 1e-7);
          run(isa, s, reduction, threads, DType::kFloat64, 1e-15);
        }
      }
    }
  });
}
