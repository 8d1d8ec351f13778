// adapter_norm and norm_adapter by plain loops, twice: exactly, and as eager PyTorch would, operator by operator, each result
// rounded to its dtype and sums in float. By their errors kernels are judged: the largest is at most twice eager's, plus
// one unit in the last place of the largest element.
#pragma once

#include <map>

#include "../cuda/ptx.h"
#include "activation.h"

struct SiteOptions {
  int64_t n, d_in, r, d, gap = 0;
  bool post = true, rms = false, sequential = true, residual = true, affine = true, biases = true;
  DType branch = DType::kFloat32, rows = branch, weights = branch;  // of x and z; of all else that has rows
  Activation activation = Activation::kGelu;
  int64_t scale_size = 0;
  double offset = 0, eps = 1e-3, alpha = 0.5;  // offset: of the rows that are normalised
  std::string only = {};                       // one gradient, or all
  std::string name() const {
    return text(post ? "post" : "pre", rms ? " rms" : " layer", " n=", n, " d=", d_in, "/", d, " r=", r, " ", dtype_name(branch),
                "/", dtype_name(rows), sequential ? " sequential" : "", residual ? "" : " no residual", affine ? "" : " bare",
                " scale ", scale_size, " act ", static_cast<int>(activation), " offset ", offset, " ", only, " ");
  }
};

inline double rounded_to(DType dtype, double value) {
  const auto single = static_cast<float>(value);
  if (dtype == DType::kBFloat16) return petl::cuda::to_float(petl::cuda::from_float<petl::cuda::bf16>(single));
  if (dtype == DType::kFloat16) return petl::cuda::to_float(petl::cuda::from_float<petl::cuda::f16>(single));
  return single;
}
inline double unit(DType dtype, double size) {
  const int bits = dtype == DType::kBFloat16 ? 7 : dtype == DType::kFloat16 ? 10 : 23;
  return size > 0 ? std::ldexp(1, std::ilogb(size) - bits) : 0;
}

struct SiteInputs {
  Stored x, hidden, residual, g, w_down, b_down, w_up, b_up, weight, bias, scale;

  explicit SiteInputs(const SiteOptions& o, std::mt19937 rng)
      : x(rng, o.n, o.d_in, o.branch, o.gap, o.post ? 0 : o.offset), hidden(rng, o.n, o.d, o.rows, o.gap),
        residual(rng, o.n, o.d, o.rows, o.gap, o.post ? o.offset : 0), g(rng, o.n, o.d, o.rows, o.gap),
        w_down(rng, o.r, o.d_in, o.weights), b_down(rng, 1, o.r, o.weights), w_up(rng, o.d, o.r, o.weights),
        b_up(rng, 1, o.d, o.weights), weight(rng, 1, o.post ? o.d : o.d_in, o.weights),
        bias(rng, 1, o.post ? o.d : o.d_in, o.weights), scale(rng, 1, std::max<int64_t>(o.scale_size, 1), o.weights) {}
};

class Site {
 public:
  Site(const SiteOptions& o, const SiteInputs& in, bool exact) : o_(o), in_(in), exact_(exact) { compute(); }

  std::map<std::string, Values> of;

 private:
  const SiteOptions& o_;
  const SiteInputs& in_;
  const bool exact_;

  double round(DType dtype, double value) const { return exact_ ? value : rounded_to(dtype, value); }
  template <typename F>
  double sum(int64_t count, F f) const {
    double total = 0;
    float lanes[8] = {};
    for (int64_t i = 0; i < count; ++i) {
      const double term = f(i);
      if (exact_) total += term;
      else lanes[i % 8] = static_cast<float>(lanes[i % 8] + term);
    }
    for (const float lane : lanes) total += lane;
    return total;
  }
  template <typename F>
  Values matrix(DType dtype, int64_t rows, int64_t cols, F f) const {
    Values all(static_cast<size_t>(rows * cols));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < cols; ++c) all[static_cast<size_t>(i * cols + c)] = round(dtype, f(i, c));
    }
    return all;
  }

  double weight(int64_t c) const { return o_.affine ? in_.weight(0, c) : 1; }
  double bias(int64_t c) const { return o_.affine && !o_.rms ? in_.bias(0, c) : 0; }
  double scale(int64_t c) const { return o_.alpha * (o_.scale_size ? in_.scale(0, o_.scale_size > 1 ? c : 0) : 1); }

  double single(double value) const { return round(DType::kFloat32, value); }  // inside a norm

  Values normalise(const Values& v, int64_t d, DType dtype) {
    const auto at = [&](int64_t i, int64_t c) { return v[static_cast<size_t>(i * d + c)]; };
    const double size = static_cast<double>(d);
    const Values mean = matrix(DType::kFloat32, o_.n, 1, [&](int64_t i, int64_t) {
      return o_.rms ? 0 : sum(d, [&](int64_t c) { return at(i, c); }) / size;
    });
    of["rstd"] = matrix(DType::kFloat32, o_.n, 1, [&](int64_t i, int64_t) {
      const auto square = [&](int64_t c) { return single(std::pow(single(at(i, c) - mean[static_cast<size_t>(i)]), 2)); };
      return 1 / single(std::sqrt(single(single(sum(d, square) / size) + o_.eps)));
    });
    if (!o_.rms) of["mean"] = mean;
    of["normal"] = matrix(DType::kFloat32, o_.n, d, [&](int64_t i, int64_t c) {
      return single(at(i, c) - mean[static_cast<size_t>(i)]) * of["rstd"][static_cast<size_t>(i)];
    });
    return matrix(dtype, o_.n, d, [&](int64_t i, int64_t c) {
      return single(of["normal"][static_cast<size_t>(i * d + c)] * weight(c)) + bias(c);
    });
  }
  Values back(const Values& g, int64_t d, DType dtype) {
    const Values& xh = of["normal"];
    const double size = static_cast<double>(d);
    const auto at = [&](int64_t i, int64_t c) { return static_cast<size_t>(i * d + c); };
    const auto gw = [&](int64_t i, int64_t c) { return single(g[at(i, c)] * weight(c)); };
    of["dweight"] = matrix(o_.weights, 1, d, [&](int64_t, int64_t c) {
      return sum(o_.n, [&](int64_t i) { return single(g[at(i, c)] * xh[at(i, c)]); });
    });
    of["dbias"] = matrix(o_.weights, 1, d, [&](int64_t, int64_t c) {
      return sum(o_.n, [&](int64_t i) { return g[at(i, c)]; });
    });
    Values all;
    for (int64_t i = 0; i < o_.n; ++i) {
      const double offset = o_.rms ? 0 : single(sum(d, [&](int64_t c) { return gw(i, c); }) / size);
      const double slope = single(sum(d, [&](int64_t c) { return single(gw(i, c) * xh[at(i, c)]); }) / size);
      for (int64_t c = 0; c < d; ++c) {
        const double rest = single(single(gw(i, c) - offset) - single(xh[at(i, c)] * slope));
        all.push_back(round(dtype, of["rstd"][static_cast<size_t>(i)] * rest));
      }
    }
    return all;
  }

  void compute() {
    const int64_t n = o_.n, d_in = o_.d_in, r = o_.r, d = o_.d;
    const DType branch = o_.branch;
    const auto at = [](const Values& v, int64_t i, int64_t c, int64_t cols) { return v[static_cast<size_t>(i * cols + c)]; };
    const Values x = in_.x.values(), g = in_.g.values(), w_down = in_.w_down.values(), w_up = in_.w_up.values();
    const Values input = o_.post ? x : normalise(x, d_in, branch);
    const Values z = matrix(branch, n, r, [&](int64_t i, int64_t k) {
      const double product = sum(d_in, [&](int64_t c) { return at(input, i, c, d_in) * at(w_down, k, c, d_in); });
      return product + (o_.biases ? in_.b_down(0, k) : 0);
    });
    const Values h = matrix(branch, n, r, [&](int64_t i, int64_t k) { return act(o_.activation, at(z, i, k, r)); });
    const Values up = matrix(branch, n, d, [&](int64_t i, int64_t c) {
      return sum(r, [&](int64_t k) { return at(h, i, k, r) * at(w_up, c, k, r); }) + (o_.biases ? in_.b_up(0, c) : 0);
    });
    Values u = matrix(branch, n, d, [&](int64_t i, int64_t c) { return scale(c) * at(up, i, c, d); });
    const auto add = [&](const Stored& term) {
      u = matrix(o_.rows, n, d, [&](int64_t i, int64_t c) { return at(u, i, c, d) + term(i, c); });
    };
    if (o_.sequential) add(in_.x);
    else if (o_.post) add(in_.hidden);
    if (o_.residual && (o_.post || !o_.sequential)) add(in_.residual);
    of["z"] = z, of["y"] = o_.post ? normalise(u, d, o_.rows) : u;

    of["dsum"] = o_.post ? back(g, d, o_.rows) : g;
    const Values& dsum = of["dsum"];
    const Values dbranch = matrix(branch, n, d, [&](int64_t i, int64_t c) {
      return round(branch, at(dsum, i, c, d)) * scale(c);
    });
    const Values dz = matrix(branch, n, r, [&](int64_t i, int64_t k) {
      const double dh = sum(d, [&](int64_t c) { return at(dbranch, i, c, d) * at(w_up, c, k, r); });
      return round(branch, dh) * slope(o_.activation, at(z, i, k, r));
    });
    // p^T q, or with q absent the sums of p's columns.
    const auto down_rows = [&](const Values& p, int64_t p_cols, const Values* q, int64_t q_cols) {
      return matrix(o_.weights, p_cols, q_cols, [&](int64_t k, int64_t c) {
        return sum(n, [&](int64_t i) { return at(p, i, k, p_cols) * (q ? at(*q, i, c, q_cols) : 1); });
      });
    };
    of["dw_up"] = down_rows(dbranch, d, &h, r), of["db_up"] = down_rows(dbranch, d, nullptr, 1);
    of["dw_down"] = down_rows(dz, r, &input, d_in), of["db_down"] = down_rows(dz, r, nullptr, 1);
    const int64_t scales = std::max<int64_t>(o_.scale_size, 1), each = scales > 1 ? 1 : d;
    of["dscale"] = matrix(o_.weights, 1, scales, [&](int64_t, int64_t s) {
      return sum(n * each, [&](int64_t e) {
        const int64_t i = e / each, c = scales > 1 ? s : e % each;
        return o_.alpha * at(dsum, i, c, d) * at(up, i, c, d);
      });
    });
    Values dx = matrix(branch, n, d_in, [&](int64_t i, int64_t c) {
      return sum(r, [&](int64_t k) { return at(dz, i, k, r) * at(w_down, k, c, d_in); });
    });
    if (!o_.post) dx = back(dx, d_in, branch);
    if (o_.sequential) {
      dx = matrix(branch, n, d_in, [&](int64_t i, int64_t c) { return at(dx, i, c, d_in) + at(dsum, i, c, d); });
    }
    of["dx"] = dx;
  }
};
