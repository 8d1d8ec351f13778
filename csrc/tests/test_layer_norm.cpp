// Every instruction set this processor has against the textbook formulas in double, on buffers of the exact size, so
// that the sanitizers see a read or write past the end.
#include "testing.h"

namespace {

struct Sizes {
  int64_t n, d, gap;
};

void run(const std::string& isa, Sizes s, DType dtype, double offset, int threads, double tolerance, double of_backward) {
  std::mt19937 rng(static_cast<unsigned>(s.n * 31 + s.d));
  const int64_t n = s.n, d = s.d;
  const double eps = 1e-3;
  Stored x(rng, n, d, dtype, s.gap, offset), g(rng, n, d, dtype, s.gap);
  Stored weight(rng, 1, d, dtype), bias(rng, 1, d, dtype);
  const size_t all = static_cast<size_t>(n * d), row = static_cast<size_t>(d);
  Values y(all), dx(all), dweight(row), dbias(row), means(static_cast<size_t>(n)), rstds(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    double mean = 0, variance = 0, offset_g = 0, slope = 0;
    // Less the offset, whose mean a double would round as the kernel does.
    for (int64_t c = 0; c < d; ++c) mean += x(i, c) - offset;
    mean /= static_cast<double>(d);
    for (int64_t c = 0; c < d; ++c) variance += (x(i, c) - offset - mean) * (x(i, c) - offset - mean);
    const double rstd = 1 / std::sqrt(variance / static_cast<double>(d) + eps);
    for (int64_t c = 0; c < d; ++c) {
      const size_t k = static_cast<size_t>(c);
      const double normal = (x(i, c) - offset - mean) * rstd;
      y[static_cast<size_t>(i) * row + k] = normal * weight(0, c) + bias(0, c);
      dweight[k] += g(i, c) * normal;
      dbias[k] += g(i, c);
      offset_g += g(i, c) * weight(0, c) / static_cast<double>(d);
      slope += g(i, c) * weight(0, c) * normal / static_cast<double>(d);
    }
    for (int64_t c = 0; c < d; ++c) {
      const double normal = (x(i, c) - offset - mean) * rstd, gw = g(i, c) * weight(0, c);
      dx[static_cast<size_t>(i * d + c)] = rstd * (gw - offset_g - normal * slope);
    }
    means[static_cast<size_t>(i)] = mean + offset;
    rstds[static_cast<size_t>(i)] = rstd;
  }

  Stored got_y(n, d, dtype), got_dx(n, d, dtype), got_dweight(1, d, dtype), got_dbias(1, d, dtype);
  Stored got_mean(1, n, dtype), got_rstd(1, n, dtype);
  const std::string name = text(isa, " n=", n, " d=", d, " offset ", offset, " ", dtype_name(dtype), " ");
  kernels().layer_norm_forward(
      {n, d, x.rows(), weight.rows(), bias.rows(), eps, got_y.rows(), got_mean.rows(), got_rstd.rows(), threads});
  compare(name + "y", got_y, y, tolerance, 1);
  compare(name + "mean", got_mean, means, tolerance, 1);
  compare(name + "rstd", got_rstd, rstds, tolerance, 1);
  for (int needs = 1; needs < 8; ++needs) {  // every set of gradients, dbias alone without x
    const Rows none;
    const bool normalised = needs & 3;
    got_dx.clear(), got_dweight.clear(), got_dbias.clear();
    kernels().layer_norm_backward({n, d, g.rows(), normalised ? x.rows() : none, normalised ? got_mean.rows() : none,
                                   normalised ? got_rstd.rows() : none, weight.rows(),
                                   needs & 1 ? got_dx.rows() : none, needs & 2 ? got_dweight.rows() : none,
                                   needs & 4 ? got_dbias.rows() : none, threads});
    if (needs & 1) compare(name + "dx", got_dx, dx, of_backward, 1);
    if (needs & 2) compare(name + "dweight", got_dweight, dweight, of_backward, 1);
    if (needs & 4) compare(name + "dbias", got_dbias, dbias, of_backward, 1);
  }
}

}  // namespace

int main() {
  const Sizes sizes[] = {{1, 1, 0}, {3, 2, 0}, {5, 16, 0}, {9, 33, 7}, {40, 100, 3}, {17, 768, 0}, {300, 260, 0}};
  return in_every_isa([&](const std::string& isa) {
    for (const Sizes& s : sizes) {
      for (int threads : {1, 3}) {
        run(isa, s, DType::kFloat32, 0.25, threads, 2e-6, 2e-6);
        run(isa, s, DType::kFloat64, 0.25, threads, 1e-14, 1e-14);
        run(isa, s, DType::kFloat64, 1e6, threads, 1e-13, 1e-9);  // the mean that is saved is rounded
      }
    }
  });
}
