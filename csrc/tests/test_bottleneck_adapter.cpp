// Every instruction set this processor has against a plain loop in double, on buffers of the exact size, so that the
// sanitizers see a read or write past the end. Gradients against the textbook formulas, not against the kernel.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../cpu/kernels.h"

using namespace petl;
using Values = std::vector<double>;

namespace {

int failures = 0;

double act(Activation a, double z) {
  switch (a) {
    case Activation::kRelu: return z > 0 ? z : 0;
    case Activation::kGelu: return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0)));
    case Activation::kGeluTanh: return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::kSilu: return z / (1 + std::exp(-z));
    case Activation::kTanh: return std::tanh(z);
    case Activation::kSigmoid: return 1 / (1 + std::exp(-z));
    case Activation::kLeakyRelu: return z > 0 ? z : 0.01 * z;
    case Activation::kIdentity: return z;
  }
  return NAN;
}

double slope(Activation a, double z) {  // central difference: independent of the derivative under test
  const double h = 1e-6;
  return (act(a, z + h) - act(a, z - h)) / (2 * h);
}

// A matrix in storage type, `gap` unused elements between rows, exactly as long as its last row needs.
struct Stored {
  std::vector<unsigned char> bytes;
  DType dtype = DType::kFloat32;
  int64_t cols = 0, stride = 0;
  Values exact;  // what the storage really holds

  Rows rows() { return bytes.empty() ? Rows{} : Rows{bytes.data(), dtype, stride}; }
  size_t element() const { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

  double read(int64_t i, int64_t j) const {
    const unsigned char* p = bytes.data() + static_cast<size_t>(i * stride + j) * element();
    double wide;
    float single;
    uint16_t half;
    switch (dtype) {
      case DType::kFloat64: std::memcpy(&wide, p, 8); return wide;
      case DType::kFloat32: std::memcpy(&single, p, 4); return single;
      case DType::kBFloat16: {
        std::memcpy(&half, p, 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(&single, &bits, 4);
        return single;
      }
      case DType::kFloat16: {
        std::memcpy(&half, p, 2);
        const int exponent = (half >> 10) & 31, fraction = half & 1023;
        const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
        return half & 0x8000 ? -size : size;
      }
    }
    return NAN;
  }
};

Stored make(int64_t rows, int64_t cols, DType dtype, int64_t gap = 0) {
  Stored m;
  m.dtype = dtype, m.cols = cols, m.stride = cols + gap;
  m.bytes.resize(static_cast<size_t>((rows - 1) * m.stride + cols) * m.element());
  return m;
}

Stored random(std::mt19937& rng, int64_t rows, int64_t cols, DType dtype, int64_t gap = 0) {
  Stored m = make(rows, cols, dtype, gap);
  std::uniform_int_distribution<int> value(-96, 96);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const float v = static_cast<float>(value(rng)) / 64.0f;  // exact in every storage type
      unsigned char* p = m.bytes.data() + static_cast<size_t>(i * m.stride + j) * m.element();
      const double wide = v;
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      if (dtype == DType::kFloat64) std::memcpy(p, &wide, 8);
      if (dtype == DType::kFloat32) std::memcpy(p, &v, 4);
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (dtype == DType::kFloat16) {
        half = v == 0 ? 0 : static_cast<uint16_t>(((bits >> 16) & 0x8000) | (((bits >> 13) & 0x3ffff) - (112 << 10)));
      }
      if (m.element() == 2) std::memcpy(p, &half, 2);
      m.exact.push_back(m.read(i, j));
    }
  }
  return m;
}

void compare(const std::string& what, const Stored& got, const Values& wanted, double tolerance) {
  double largest = 0, error = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const auto row = static_cast<int64_t>(i) / got.cols, col = static_cast<int64_t>(i) % got.cols;
    const double difference = std::abs(got.read(row, col) - wanted[i]);
    error = std::max(error, std::isnan(difference) ? INFINITY : difference);
    largest = std::max(largest, std::abs(wanted[i]));
  }
  if (error > tolerance * largest) {
    std::printf("FAIL %s: error %g, largest %g\n", what.c_str(), error, largest);
    ++failures;
  }
}

struct Sizes {
  int64_t n, d_in, r, d_out, gap;
};

void run(const std::string& isa, Sizes s, DType dtype, DType weights, Activation activation, int64_t scale_size,
         bool sequential, int threads) {
  std::mt19937 rng(static_cast<unsigned>(s.n * 31 + s.d_in * 7 + s.r));
  Stored x = random(rng, s.n, s.d_in, dtype, s.gap), w_down = random(rng, s.r, s.d_in, weights);
  Stored b_down = random(rng, 1, s.r, weights), w_up = random(rng, s.d_out, s.r, weights);
  Stored b_up = random(rng, 1, s.d_out, weights), other = random(rng, s.n, s.d_out, dtype, s.gap);
  Stored scale = random(rng, 1, std::max<int64_t>(scale_size, 1), weights), g = random(rng, s.n, s.d_out, dtype, s.gap);
  Stored &residual = sequential ? x : other, y = other;
  const double alpha = 1.25;
  const auto scaled = [&](int64_t c) { return alpha * (scale_size ? scale.exact[scale_size == 1 ? 0 : c] : 1.0); };
  const auto at = [](const Stored& m, int64_t i, int64_t j) { return m.exact[static_cast<size_t>(i * m.cols + j)]; };

  Values z(static_cast<size_t>(s.n * s.r)), want_y(static_cast<size_t>(s.n * s.d_out));
  Values u(want_y.size()), dz(z.size()), dx(static_cast<size_t>(s.n * s.d_in)), dw_down(w_down.exact.size());
  Values db_down(b_down.exact.size()), dw_up(w_up.exact.size()), db_up(b_up.exact.size()), dscale(scale.exact.size());
  for (int64_t i = 0; i < s.n; ++i) {
    for (int64_t k = 0; k < s.r; ++k) {
      double& sum = z[static_cast<size_t>(i * s.r + k)] = b_down.exact[static_cast<size_t>(k)];
      for (int64_t c = 0; c < s.d_in; ++c) sum += at(x, i, c) * at(w_down, k, c);
    }
    for (int64_t c = 0; c < s.d_out; ++c) {
      const auto e = static_cast<size_t>(i * s.d_out + c);
      u[e] = b_up.exact[static_cast<size_t>(c)];
      for (int64_t k = 0; k < s.r; ++k) u[e] += act(activation, z[static_cast<size_t>(i * s.r + k)]) * at(w_up, c, k);
      want_y[e] = at(residual, i, c) + scaled(c) * u[e];
      db_up[static_cast<size_t>(c)] += scaled(c) * at(g, i, c);
      if (scale_size) dscale[static_cast<size_t>(scale_size == 1 ? 0 : c)] += alpha * at(g, i, c) * u[e];
    }
    for (int64_t k = 0; k < s.r; ++k) {
      const auto e = static_cast<size_t>(i * s.r + k);
      const double h = act(activation, z[e]);
      for (int64_t c = 0; c < s.d_out; ++c) {
        dz[e] += scaled(c) * at(g, i, c) * at(w_up, c, k);
        dw_up[static_cast<size_t>(c * s.r + k)] += scaled(c) * at(g, i, c) * h;
      }
      dz[e] *= slope(activation, z[e]);
      db_down[static_cast<size_t>(k)] += dz[e];
      for (int64_t c = 0; c < s.d_in; ++c) {
        dw_down[static_cast<size_t>(k * s.d_in + c)] += dz[e] * at(x, i, c);
        dx[static_cast<size_t>(i * s.d_in + c)] += dz[e] * at(w_down, k, c);
      }
    }
    for (int64_t c = 0; sequential && c < s.d_in; ++c) dx[static_cast<size_t>(i * s.d_in + c)] += at(g, i, c);
  }

  y = make(s.n, s.d_out, dtype);
  Stored got_z = make(s.n, s.r, dtype), got_dx = make(s.n, s.d_in, dtype), got_dw_down = make(s.r, s.d_in, weights);
  Stored got_db_down = make(1, s.r, weights), got_dw_up = make(s.d_out, s.r, weights);
  Stored got_db_up = make(1, s.d_out, weights), got_dscale = make(1, std::max<int64_t>(scale_size, 1), weights);
  const Rows scale_rows = scale_size ? scale.rows() : Rows{}, dscale_rows = scale_size ? got_dscale.rows() : Rows{};
  kernels().bottleneck_forward({s.n, s.d_in, s.r, s.d_out, x.rows(), w_down.rows(), b_down.rows(), w_up.rows(),
                                b_up.rows(), residual.rows(), scale_rows, scale_size, alpha, activation, y.rows(),
                                got_z.rows(), threads});
  kernels().bottleneck_backward({s.n, s.d_in, s.r, s.d_out, g.rows(), x.rows(), got_z.rows(), w_down.rows(),
                                 w_up.rows(), b_up.rows(), scale_rows, scale_size, alpha, activation, sequential,
                                 got_dx.rows(), got_dw_down.rows(), got_db_down.rows(), got_dw_up.rows(),
                                 got_db_up.rows(), dscale_rows, threads});

  const double tolerance = dtype == DType::kFloat64   ? 1e-8  // of the central difference
                           : dtype == DType::kFloat32 ? 1e-5
                           : dtype == DType::kFloat16 ? 4e-3
                                                      : 3e-2;
  const std::string name = isa + " n=" + std::to_string(s.n) + " d=" + std::to_string(s.d_in) + "/" +
                           std::to_string(s.d_out) + " r=" + std::to_string(s.r) + " dtype " +
                           std::to_string(static_cast<int>(dtype)) + " act " +
                           std::to_string(static_cast<int>(activation)) + " scale " + std::to_string(scale_size) + " ";
  compare(name + "y", y, want_y, tolerance);
  compare(name + "z", got_z, z, tolerance);
  compare(name + "dx", got_dx, dx, tolerance);
  compare(name + "dw_down", got_dw_down, dw_down, tolerance);
  compare(name + "db_down", got_db_down, db_down, tolerance);
  compare(name + "dw_up", got_dw_up, dw_up, tolerance);
  compare(name + "db_up", got_db_up, db_up, tolerance);
  if (scale_size) compare(name + "dscale", got_dscale, dscale, tolerance);
}

}  // namespace

int main() {
  const Sizes sizes[] = {{1, 1, 1, 1, 0},    {1, 16, 8, 16, 0},  {5, 33, 3, 33, 7},    {14, 32, 16, 32, 0},
                         {17, 48, 24, 48, 3}, {29, 100, 33, 100, 0}, {97, 64, 65, 64, 1}, {211, 31, 5, 31, 0}};
  const DType half_or_single[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (const std::string& isa : isas()) {
    set_isa(isa);
    for (const Sizes& s : sizes) {
      run(isa, s, DType::kFloat64, DType::kFloat64, Activation::kGelu, s.d_out, true, 1);
      for (DType dtype : half_or_single) run(isa, s, dtype, dtype, Activation::kGelu, 0, true, 2);
      run(isa, s, DType::kBFloat16, DType::kFloat32, Activation::kSilu, 1, false, 3);
    }
    for (int a = 0; a <= static_cast<int>(Activation::kIdentity); ++a) {
      run(isa, {23, 40, 12, 56, 2}, DType::kFloat32, DType::kFloat32, static_cast<Activation>(a), 56, false, 2);
      run(isa, {23, 40, 12, 56, 2}, DType::kFloat64, DType::kFloat64, static_cast<Activation>(a), 1, false, 2);
    }
    std::printf("%s: done\n", isa.c_str());
  }
  std::printf("%s\n", failures ? "FAILED" : "passed");
  return failures ? 1 : 0;
}
