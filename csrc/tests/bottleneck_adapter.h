// A call of the bottleneck adapter in both directions, and what it has to be by plain loops in double. Gradients by the
// textbook formulas, not by the kernels'.
#pragma once

#include "activation.h"

struct AdapterSizes {
  int64_t n, d_in, r, d_out, gap;
};

struct AdapterOptions {
  DType dtype = DType::kFloat32, weights = DType::kFloat32;
  Activation activation = Activation::kGelu;
  int64_t scale_size = 0;
  bool sequential = true, gated = false;
  double dropout = 0, alpha = 1.25;
  std::string only = {};  // one gradient, or all
};

// h of one row of z, and z's gradient given that of h.
inline Values activate(Activation a, const double* z, int64_t r) {
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
inline void differentiate(Activation a, const double* z, const Values& h, double* dh) {
  const size_t r = h.size();
  double mean = 0;
  for (size_t k = 0; k < r; ++k) mean += h[k] * dh[k];
  for (size_t k = 0; k < r; ++k) dh[k] = a == Activation::kSoftmax ? h[k] * (dh[k] - mean) : dh[k] * slope(a, z[k]);
}

// Philox-4x32-10, one counter at a time: the word of an element.
inline uint32_t philox(uint64_t seed, int64_t row, int64_t column) {
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

class AdapterCase {
 public:
  AdapterCase(AdapterSizes s, const AdapterOptions& o)
      : s_(s), o_(o), rng_(static_cast<unsigned>(s.n * 31 + s.d_in * 7 + s.r)), scales_(std::max<int64_t>(o.scale_size, 1)),
        x_(rng_, s.n, s.d_in, o.dtype, s.gap), w_down_(rng_, s.r, s.d_in, o.weights), b_down_(rng_, 1, s.r, o.weights),
        w_up_(rng_, s.d_out, s.r, o.weights), b_up_(rng_, 1, s.d_out, o.weights), other_(rng_, s.n, s.d_out, o.dtype, s.gap),
        scale_(rng_, 1, scales_, o.weights), g_(rng_, s.n, s.d_out, o.dtype, s.gap), gate_(rng_, s.n, 1, o.weights),
        y_(s.n, s.d_out, o.dtype), z_(s.n, s.r, o.dtype), dx_(s.n, s.d_in, o.dtype), dw_down_(s.r, s.d_in, o.weights),
        db_down_(1, s.r, o.weights), dw_up_(s.d_out, s.r, o.weights), db_up_(1, s.d_out, o.weights),
        dscale_(1, scales_, o.weights), dgate_(s.n, 1, o.weights) {}

  BottleneckForward forward(int threads) {
    return {s_.n, s_.d_in, s_.r, s_.d_out, x_.rows(), w_down_.rows(), b_down_.rows(), w_up_.rows(), b_up_.rows(),
            (o_.sequential ? x_ : other_).rows(), scale_rows(), gate_rows(), o_.scale_size, dropout(), o_.alpha,
            o_.activation, y_.rows(), z_.rows(), threads};
  }
  BottleneckBackward backward(int threads) {
    const auto wanted = [&](const char* name, Stored& m) { return o_.only.empty() || o_.only == name ? m.rows() : Rows{}; };
    return {s_.n, s_.d_in, s_.r, s_.d_out, g_.rows(), x_.rows(), z_.rows(), w_down_.rows(), w_up_.rows(), b_up_.rows(),
            scale_rows(), gate_rows(), o_.scale_size, dropout(), o_.alpha, o_.activation, o_.sequential, wanted("dx", dx_),
            wanted("dw_down", dw_down_), wanted("db_down", db_down_), wanted("dw_up", dw_up_), wanted("db_up", db_up_),
            o_.scale_size ? wanted("dscale", dscale_) : Rows{}, o_.gated ? wanted("dgate", dgate_) : Rows{}, threads};
  }

  std::string name() const {
    return text(" n=", s_.n, " d=", s_.d_in, "/", s_.d_out, " r=", s_.r, " ", dtype_name(o_.dtype), " act ",
                static_cast<int>(o_.activation), " scale ", o_.scale_size, " dropout ", o_.dropout,
                o_.gated ? " gated " : " ", o_.only, " ");
  }

  // What both directions left behind; the gradient of a scalar scale may err `of_scalar` times as much.
  void check(const std::string& where, double tolerated, double of_scalar = 1) const {
    const Wanted w = wanted();
    const std::string name = where + this->name();
    const auto compare_if = [&](const char* what, const Stored& got, const Values& want, double of = 1) {
      if (o_.only.empty() || o_.only == what) compare(name + what, got, want, tolerated * of);
    };
    compare(name + "y", y_, w.y, tolerated);
    compare(name + "z", z_, w.z, tolerated);
    compare_if("dx", dx_, w.dx);
    compare_if("dw_down", dw_down_, w.dw_down);
    compare_if("db_down", db_down_, w.db_down);
    compare_if("dw_up", dw_up_, w.dw_up);
    compare_if("db_up", db_up_, w.db_up);
    if (o_.scale_size) compare_if("dscale", dscale_, w.dscale, o_.scale_size == 1 ? of_scalar : 1);
    if (o_.gated) compare_if("dgate", dgate_, w.dgate);
  }

  // Their bits.
  std::vector<unsigned char> weight_gradients() const {
    std::vector<unsigned char> bits(dw_down_.bytes);
    bits.insert(bits.end(), dw_up_.bytes.begin(), dw_up_.bytes.end());
    return bits;
  }

 private:
  struct Wanted {
    Values y, z, dx, dw_down, db_down, dw_up, db_up, dscale, dgate;
  };

  Rows scale_rows() { return o_.scale_size ? scale_.rows() : Rows{}; }
  Rows gate_rows() { return o_.gated ? gate_.rows() : Rows{}; }
  Dropout dropout() const { return o_.dropout > 0 ? Dropout{&seed_, o_.dropout} : Dropout{}; }
  double scale(int64_t c) const { return o_.alpha * (o_.scale_size ? scale_(0, o_.scale_size == 1 ? 0 : c) : 1.0); }
  double gate(int64_t i) const { return o_.gated ? gate_(i, 0) : 1.0; }
  double kept(int64_t i, int64_t k) const {
    if (o_.dropout == 0) return 1;
    return philox(static_cast<uint64_t>(seed_), i, k) / 4294967296.0 < o_.dropout ? 0 : 1 / (1 - o_.dropout);
  }

  Wanted wanted() const {
    const auto size = [](int64_t rows, int64_t cols) { return Values(static_cast<size_t>(rows * cols)); };
    const Values x = x_.values(), w_down = w_down_.values(), w_up = w_up_.values(), g = g_.values();
    const Stored& residual = o_.sequential ? x_ : other_;
    Wanted w{size(s_.n, s_.d_out), size(s_.n, s_.r), size(s_.n, s_.d_in), size(s_.r, s_.d_in), size(1, s_.r),
             size(s_.d_out, s_.r), size(1, s_.d_out), size(1, scales_), size(s_.n, 1)};
    for (int64_t i = 0; i < s_.n; ++i) {
      const double *x_row = x.data() + i * s_.d_in, *g_row = g.data() + i * s_.d_out;
      Values z(static_cast<size_t>(s_.r)), factor(z.size()), dz(z.size());
      for (int64_t k = 0; k < s_.r; ++k) {
        const auto e = static_cast<size_t>(k);
        z[e] = b_down_(0, k), factor[e] = kept(i, k);
        for (int64_t c = 0; c < s_.d_in; ++c) z[e] += x_row[c] * w_down[static_cast<size_t>(k * s_.d_in + c)];
      }
      const Values h = activate(o_.activation, z.data(), s_.r);
      const Values& saved = o_.activation == Activation::kSoftmax ? h : z;
      std::copy(saved.begin(), saved.end(), w.z.begin() + i * s_.r);
      for (int64_t c = 0; c < s_.d_out; ++c) {
        const auto e = static_cast<size_t>(c);
        const double branch_g = gate(i) * scale(c) * g_row[c], *w_row = w_up.data() + c * s_.r;
        double* const dw_row = w.dw_up.data() + c * s_.r;
        double u = b_up_(0, c);
        for (size_t k = 0; k < z.size(); ++k) {
          u += factor[k] * h[k] * w_row[k];
          dz[k] += branch_g * w_row[k] * factor[k];
          dw_row[k] += branch_g * factor[k] * h[k];
        }
        w.y[static_cast<size_t>(i * s_.d_out + c)] = residual(i, c) + gate(i) * scale(c) * u;
        w.db_up[e] += branch_g;
        w.dscale[o_.scale_size > 1 ? e : 0] += o_.alpha * gate(i) * g_row[c] * u;
        w.dgate[static_cast<size_t>(i)] += scale(c) * g_row[c] * u;
      }
      differentiate(o_.activation, z.data(), h, dz.data());
      double* const dx_row = w.dx.data() + i * s_.d_in;
      for (int64_t c = 0; o_.sequential && c < s_.d_in; ++c) dx_row[c] = g_row[c];
      for (size_t k = 0; k < z.size(); ++k) {
        const double* const w_row = w_down.data() + static_cast<int64_t>(k) * s_.d_in;
        double* const dw_row = w.dw_down.data() + static_cast<int64_t>(k) * s_.d_in;
        w.db_down[k] += dz[k];
        for (int64_t c = 0; c < s_.d_in; ++c) dw_row[c] += dz[k] * x_row[c], dx_row[c] += dz[k] * w_row[c];
      }
    }
    return w;
  }

  const AdapterSizes s_;
  const AdapterOptions o_;
  const int64_t seed_ = -0x123456789abcdef;
  std::mt19937 rng_;
  const int64_t scales_;
  Stored x_, w_down_, b_down_, w_up_, b_up_, other_, scale_, g_, gate_;
  Stored y_, z_, dx_, dw_down_, db_down_, dw_up_, db_up_, dscale_, dgate_;
};
