// Every instruction set this processor has against the formulas in double, on buffers of the exact size, so that the
// sanitizers see a read or write past the end.
#include "testing.h"

namespace {

struct Sizes {
  int64_t n, d, gap;
};

void run(const std::string& isa, Sizes s, DType dtype, DType of_scale, int threads) {
  std::mt19937 rng(static_cast<unsigned>(s.n * 31 + s.d));
  const int64_t n = s.n, d = s.d;
  Stored x(rng, n, d, dtype, s.gap), g(rng, n, d, dtype, s.gap), scale(rng, 1, d, of_scale);
  Values y(static_cast<size_t>(n * d)), dx(y), dscale(static_cast<size_t>(d));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < d; ++c) {
      y[static_cast<size_t>(i * d + c)] = x(i, c) * scale(0, c);
      dx[static_cast<size_t>(i * d + c)] = g(i, c) * scale(0, c);
      dscale[static_cast<size_t>(c)] += g(i, c) * x(i, c);
    }
  }

  Stored got_y(n, d, dtype), got_dx(n, d, dtype, s.gap), got_dscale(1, d, of_scale);
  const std::string name = text(isa, " n=", n, " d=", d, " ", dtype_name(dtype), "/", dtype_name(of_scale), " ");
  kernels().channel_scale_forward({n, d, x.rows(), scale.rows(), got_y.rows(), threads});
  compare(name + "y", got_y, y, tolerance(dtype), 1);
  for (int needs = 1; needs < 4; ++needs) {  // every set of gradients, dx alone without x
    const Rows none;
    got_dx.clear(), got_dscale.clear();
    kernels().channel_scale_backward({n, d, g.rows(), needs & 2 ? x.rows() : none, scale.rows(),
                                      needs & 1 ? got_dx.rows() : none, needs & 2 ? got_dscale.rows() : none, threads});
    if (needs & 1) compare(name + "dx", got_dx, dx, tolerance(dtype), 1);
    if (needs & 2) compare(name + "dscale", got_dscale, dscale, tolerance(of_scale), 1);
  }
}

}  // namespace

int main() {
  const Sizes sizes[] = {{1, 1, 0}, {3, 2, 0}, {5, 16, 0}, {9, 33, 7}, {40, 100, 3}, {17, 768, 0}, {300, 260, 0}};
  return in_every_isa([&](const std::string& isa) {
    for (const Sizes& s : sizes) {
      for (int threads : {1, 3}) {
        for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
          for (DType of_scale : {DType::kFloat32, DType::kBFloat16}) run(isa, s, dtype, of_scale, threads);
        }
        run(isa, s, DType::kFloat64, DType::kFloat64, threads);
      }
    }
  });
}
