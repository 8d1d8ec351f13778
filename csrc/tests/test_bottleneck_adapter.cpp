// Every instruction set this processor has against a plain loop in double, on buffers of the exact size, so that the
// sanitizers see a read or write past the end. Gradients against the textbook formulas, not against the kernel.
#include "activation.h"

namespace {

// h of one row of z, and z's gradient given that of h.
Values activate(Activation a, const double* z, int64_t r) {
  Values h(z, z + r);
  if (a != Activation::kSoftmax) {
    for (double& v : h) v = act(a, v);
    return h;
  }
  double sum = 0;
  for (double& v : h) sum += v = std::exp(v);
  for (double& v : h) v /= sum;
  return h;
}
void differentiate(Activation a, const double* z, const Values& h, double* dh) {
  const size_t r = h.size();
  double mean = 0;
  for (size_t k = 0; k < r; ++k) mean += h[k] * dh[k];
  for (size_t k = 0; k < r; ++k) dh[k] = a == Activation::kSoftmax ? h[k] * (dh[k] - mean) : dh[k] * slope(a, z[k]);
}

// Philox-4x32-10, one counter at a time: the word of an element.
uint32_t philox(uint64_t seed, int64_t row, int64_t column) {
  const auto group = static_cast<uint64_t>(row / 4);
  uint32_t c[4] = {static_cast<uint32_t>(column), static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0};
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9e3779b9u, key1 += 0xbb67ae85u) {
    const uint64_t first = 0xd2511f53ull * c[0], third = 0xcd9e8d57ull * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(third >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(third),
                              static_cast<uint32_t>(first >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(first)};
    std::copy(next, next + 4, c);
  }
  return c[row % 4];
}

struct Sizes {
  int64_t n, d_in, r, d_out, gap;
};

void run(const std::string& isa, Sizes s, DType dtype, DType weights, Activation activation, int64_t scale_size,
         bool sequential, int threads, double p = 0, bool gated = false) {
  std::mt19937 rng(static_cast<unsigned>(s.n * 31 + s.d_in * 7 + s.r));
  Stored x(rng, s.n, s.d_in, dtype, s.gap), w_down(rng, s.r, s.d_in, weights), b_down(rng, 1, s.r, weights);
  Stored w_up(rng, s.d_out, s.r, weights), b_up(rng, 1, s.d_out, weights), other(rng, s.n, s.d_out, dtype, s.gap);
  const int64_t scales = std::max<int64_t>(scale_size, 1);
  Stored scale(rng, 1, scales, weights), g(rng, s.n, s.d_out, dtype, s.gap), &residual = sequential ? x : other;
  Stored gate(rng, s.n, 1, weights);
  const int64_t seed = -0x123456789abcdef;
  const Dropout dropout = p > 0 ? Dropout{&seed, p} : Dropout{};
  const auto gates = [&](int64_t i) { return gated ? gate(i, 0) : 1.0; };
  const auto kept = [&](int64_t i, int64_t k) {
    if (p == 0) return 1.0;
    return philox(static_cast<uint64_t>(seed), i, k) / 4294967296.0 < p ? 0.0 : 1 / (1 - p);
  };
  const double alpha = 1.25;
  const auto scaled = [&](int64_t c) { return alpha * (scale_size ? scale(0, scale_size == 1 ? 0 : c) : 1.0); };

  Values z(static_cast<size_t>(s.n * s.r)), want_y(static_cast<size_t>(s.n * s.d_out));
  Values u(want_y.size()), dz(z.size()), dx(static_cast<size_t>(s.n * s.d_in));
  Values dw_down(static_cast<size_t>(s.r * s.d_in)), db_down(static_cast<size_t>(s.r));
  Values dw_up(static_cast<size_t>(s.d_out * s.r)), db_up(static_cast<size_t>(s.d_out));
  Values dscale(static_cast<size_t>(scales)), dgate(static_cast<size_t>(s.n)), saved(z.size());
  for (int64_t i = 0; i < s.n; ++i) {
    for (int64_t k = 0; k < s.r; ++k) {
      double& sum = z[static_cast<size_t>(i * s.r + k)] = b_down(0, k);
      for (int64_t c = 0; c < s.d_in; ++c) sum += x(i, c) * w_down(k, c);
    }
    double* z_row = z.data() + i * s.r;
    const Values h = activate(activation, z_row, s.r);
    std::copy_n(activation == Activation::kSoftmax ? h.data() : z_row, s.r, saved.data() + i * s.r);
    for (int64_t c = 0; c < s.d_out; ++c) {
      const auto e = static_cast<size_t>(i * s.d_out + c);
      u[e] = b_up(0, c);
      for (int64_t k = 0; k < s.r; ++k) u[e] += kept(i, k) * h[static_cast<size_t>(k)] * w_up(c, k);
      want_y[e] = residual(i, c) + gates(i) * scaled(c) * u[e];
      dgate[static_cast<size_t>(i)] += scaled(c) * g(i, c) * u[e];
      db_up[static_cast<size_t>(c)] += gates(i) * scaled(c) * g(i, c);
      if (scale_size) dscale[static_cast<size_t>(scale_size == 1 ? 0 : c)] += alpha * gates(i) * g(i, c) * u[e];
    }
    for (int64_t k = 0; k < s.r; ++k) {
      const double factor = gates(i) * kept(i, k);
      for (int64_t c = 0; c < s.d_out; ++c) {
        dz[static_cast<size_t>(i * s.r + k)] += factor * scaled(c) * g(i, c) * w_up(c, k);
        dw_up[static_cast<size_t>(c * s.r + k)] += scaled(c) * g(i, c) * factor * h[static_cast<size_t>(k)];
      }
    }
    differentiate(activation, z_row, h, dz.data() + i * s.r);
    for (int64_t k = 0; k < s.r; ++k) {
      const auto e = static_cast<size_t>(i * s.r + k);
      db_down[static_cast<size_t>(k)] += dz[e];
      for (int64_t c = 0; c < s.d_in; ++c) {
        dw_down[static_cast<size_t>(k * s.d_in + c)] += dz[e] * x(i, c);
        dx[static_cast<size_t>(i * s.d_in + c)] += dz[e] * w_down(k, c);
      }
    }
    for (int64_t c = 0; sequential && c < s.d_in; ++c) dx[static_cast<size_t>(i * s.d_in + c)] += g(i, c);
  }

  Stored y(s.n, s.d_out, dtype), got_z(s.n, s.r, dtype), got_dx(s.n, s.d_in, dtype), got_dw_down(s.r, s.d_in, weights);
  Stored got_db_down(1, s.r, weights), got_dw_up(s.d_out, s.r, weights), got_db_up(1, s.d_out, weights);
  Stored got_dscale(1, scales, weights), got_dgate(s.n, 1, weights);
  const Rows gate_rows = gated ? gate.rows() : Rows{}, dgate_rows = gated ? got_dgate.rows() : Rows{};
  const Rows scale_rows = scale_size ? scale.rows() : Rows{}, dscale_rows = scale_size ? got_dscale.rows() : Rows{};
  kernels().bottleneck_forward({s.n, s.d_in, s.r, s.d_out, x.rows(), w_down.rows(), b_down.rows(), w_up.rows(),
                                b_up.rows(), residual.rows(), scale_rows, gate_rows, scale_size, dropout, alpha,
                                activation, y.rows(), got_z.rows(), threads});
  kernels().bottleneck_backward({s.n, s.d_in, s.r, s.d_out, g.rows(), x.rows(), got_z.rows(), w_down.rows(),
                                 w_up.rows(), b_up.rows(), scale_rows, gate_rows, scale_size, dropout, alpha, activation,
                                 sequential, got_dx.rows(), got_dw_down.rows(), got_db_down.rows(), got_dw_up.rows(),
                                 got_db_up.rows(), dscale_rows, dgate_rows, threads});

  const double tolerated = dtype == DType::kFloat64 ? 1e-8 : tolerance(dtype);  // that of the central difference
  const std::string name = text(isa, " n=", s.n, " d=", s.d_in, "/", s.d_out, " r=", s.r, " ", dtype_name(dtype), " act ",
                                static_cast<int>(activation), " scale ", scale_size, " dropout ", p, gated ? " gated " : " ");
  compare(name + "y", y, want_y, tolerated);
  compare(name + "z", got_z, saved, tolerated);
  compare(name + "dx", got_dx, dx, tolerated);
  compare(name + "dw_down", got_dw_down, dw_down, tolerated);
  compare(name + "db_down", got_db_down, db_down, tolerated);
  compare(name + "dw_up", got_dw_up, dw_up, tolerated);
  compare(name + "db_up", got_db_up, db_up, tolerated);
  if (scale_size) compare(name + "dscale", got_dscale, dscale, tolerated);
  if (gated) compare(name + "dgate", got_dgate, dgate, tolerated);
}

}  // namespace

int main() {
  const Sizes sizes[] = {{1, 1, 1, 1, 0},    {1, 16, 8, 16, 0},  {5, 33, 3, 33, 7},    {14, 32, 16, 32, 0},
                         {17, 48, 24, 48, 3}, {29, 100, 33, 100, 0}, {97, 64, 65, 64, 1}, {211, 31, 5, 31, 0}};
  const DType half_or_single[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  return in_every_isa([&](const std::string& isa) {
    for (const Sizes& s : sizes) {
      run(isa, s, DType::kFloat64, DType::kFloat64, Activation::kGelu, s.d_out, true, 1);
      for (DType dtype : half_or_single) run(isa, s, dtype, dtype, Activation::kGelu, 0, true, 2);
      run(isa, s, DType::kBFloat16, DType::kFloat32, Activation::kSilu, 1, false, 3);
      run(isa, s, DType::kFloat64, DType::kFloat64, Activation::kTanh, 1, false, 1, 0.4, true);
      run(isa, s, DType::kFloat32, DType::kFloat32, Activation::kSoftmax, s.d_out, false, 2, 0.25, true);
      run(isa, s, DType::kFloat32, DType::kFloat32, Activation::kGelu, 0, false, 2, 0.1);
      run(isa, s, DType::kBFloat16, DType::kFloat32, Activation::kGelu, 0, false, 2, 0, true);
    }
    for (int a = 0; a <= static_cast<int>(Activation::kSoftmax); ++a) {
      run(isa, {23, 40, 12, 56, 2}, DType::kFloat32, DType::kFloat32, static_cast<Activation>(a), 56, false, 2);
      run(isa, {23, 40, 12, 56, 2}, DType::kFloat64, DType::kFloat64, static_cast<Activation>(a), 1, false, 2);
    }
  });
}
