// Every instruction set this processor has against plain loops in double: norm(x + residual + s up(act(down(x)))) and
// residual + s up(act(down(norm(x)))), on buffers of the exact size, so that the sanitizers see a read or write past the
// end. Gradients of both from one pair of loops that knows nothing of the kernels' rank-space sums.
#include "testing.h"

namespace {

struct Sizes {
  int64_t n, d, r, gap;
};

double at(const Values& v, int64_t i, int64_t c, int64_t d) { return v[static_cast<size_t>(i * d + c)]; }
double& at(Values& v, int64_t i, int64_t c, int64_t d) { return v[static_cast<size_t>(i * d + c)]; }

struct Normalised {  // rows of v, their norm, and how a gradient goes back through it
  int64_t n, d;
  bool rms;
  Values hat, mean, rstd;

  Normalised(const Values& v, int64_t n, int64_t d, double eps, bool rms) : n(n), d(d), rms(rms), hat(v.size()) {
    for (int64_t i = 0; i < n; ++i) {
      double m = 0, variance = 0;
      for (int64_t c = 0; c < d && !rms; ++c) m += at(v, i, c, d) / static_cast<double>(d);
      for (int64_t c = 0; c < d; ++c) variance += (at(v, i, c, d) - m) * (at(v, i, c, d) - m) / static_cast<double>(d);
      mean.push_back(m), rstd.push_back(1 / std::sqrt(variance + eps));
      for (int64_t c = 0; c < d; ++c) at(hat, i, c, d) = (at(v, i, c, d) - m) * rstd.back();
    }
  }
  Values back(const Values& g, const Stored& weight, Values& dweight, Values& dbias) const {
    Values dv(g.size());
    for (int64_t i = 0; i < n; ++i) {
      double offset = 0, slope = 0;
      for (int64_t c = 0; c < d; ++c) {
        const double gw = at(g, i, c, d) * weight(0, c), xh = at(hat, i, c, d);
        offset += rms ? 0 : gw / static_cast<double>(d);
        slope += gw * xh / static_cast<double>(d);
        dweight[static_cast<size_t>(c)] += at(g, i, c, d) * xh;
        dbias[static_cast<size_t>(c)] += at(g, i, c, d);
      }
      for (int64_t c = 0; c < d; ++c) {
        at(dv, i, c, d) = rstd[static_cast<size_t>(i)] * (at(g, i, c, d) * weight(0, c) - offset - at(hat, i, c, d) * slope);
      }
    }
    return dv;
  }
};

Values values(const Stored& s) {
  Values v;
  for (int64_t i = 0; i < s.n; ++i) {
    for (int64_t c = 0; c < s.cols; ++c) v.push_back(s(i, c));
  }
  return v;
}

void run(const std::string& isa, Sizes s, DType dtype, bool rms, int threads) {
  std::mt19937 rng(static_cast<unsigned>(s.n * 31 + s.d * 7 + s.r));
  const int64_t n = s.n, d = s.d, r = s.r;
  const double eps = 1e-3, alpha = 1.25;
  const DType weights = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  Stored x(rng, n, d, dtype, s.gap), residual(rng, n, d, dtype, s.gap), g(rng, n, d, dtype, s.gap);
  Stored w_down(rng, r, d, weights), b_down(rng, 1, r, weights), w_up(rng, d, r, weights), b_up(rng, 1, d, weights);
  Stored weight(rng, 1, d, weights), bias(rng, 1, d, weights);
  const std::string name = text(isa, " n=", n, " d=", d, " r=", r, rms ? " rms " : " layer ", dtype_name(dtype), " ");
  const double allowed = 4 * tolerance(dtype);

  for (bool post : {true, false}) {
    // The branch reads x, or norm(x) weight + bias.
    Values input = values(x);
    const Normalised before(input, n, d, eps, rms);
    if (!post) {
      for (int64_t i = 0; i < n * d; ++i) {
        input[static_cast<size_t>(i)] = before.hat[static_cast<size_t>(i)] * weight(0, i % d) + bias(0, i % d);
      }
    }
    Values z(static_cast<size_t>(n * r)), sum(input.size());
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < r; ++k) {
        double v = b_down(0, k);
        for (int64_t c = 0; c < d; ++c) v += at(input, i, c, d) * w_down(k, c);
        at(z, i, k, r) = v;
      }
      for (int64_t c = 0; c < d; ++c) {
        double v = b_up(0, c);
        for (int64_t k = 0; k < r; ++k) v += std::tanh(at(z, i, k, r)) * w_up(c, k);
        at(sum, i, c, d) = residual(i, c) + (post ? x(i, c) : 0) + alpha * v;
      }
    }
    const Normalised after(sum, n, d, eps, rms);
    const Normalised& normalised = post ? after : before;
    Values y = sum, dweight(static_cast<size_t>(d)), dbias(dweight), du = values(g);
    if (post) {
      for (int64_t i = 0; i < n * d; ++i) {
        y[static_cast<size_t>(i)] = after.hat[static_cast<size_t>(i)] * weight(0, i % d) + bias(0, i % d);
      }
      du = after.back(du, weight, dweight, dbias);
    }
    Values dinput(du.size()), dw_down(static_cast<size_t>(r * d)), db_down(static_cast<size_t>(r));
    Values dw_up(static_cast<size_t>(d * r)), db_up(static_cast<size_t>(d));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < d; ++c) at(db_up, 0, c, d) += alpha * at(du, i, c, d);
      for (int64_t k = 0; k < r; ++k) {
        const double h = std::tanh(at(z, i, k, r));
        double dz = 0;
        for (int64_t c = 0; c < d; ++c) {
          dz += alpha * at(du, i, c, d) * w_up(c, k) * (1 - h * h);
          at(dw_up, c, k, r) += alpha * at(du, i, c, d) * h;
        }
        db_down[static_cast<size_t>(k)] += dz;
        for (int64_t c = 0; c < d; ++c) {
          at(dinput, i, c, d) += dz * w_down(k, c);
          at(dw_down, k, c, d) += dz * at(input, i, c, d);
        }
      }
    }
    Values dx = post ? dinput : before.back(dinput, weight, dweight, dbias);
    for (size_t i = 0; post && i < dx.size(); ++i) dx[i] += du[i];

    Stored got_y(n, d, dtype), got_z(n, r, dtype), got_mean(1, n, weights), got_rstd(1, n, weights);
    Stored got_dx(n, d, dtype), got_dsum(n, d, dtype), got_dw_down(r, d, weights), got_db_down(1, r, weights);
    Stored got_dw_up(d, r, weights), got_db_up(1, d, weights), got_dweight(1, d, weights), got_dbias(1, d, weights);
    const Rows none;
    const Norm norm{weight.rows(), bias.rows(), eps, rms, rms ? none : got_mean.rows(), got_rstd.rows()};
    const BottleneckForward forward{n, d, r, d, x.rows(), w_down.rows(), b_down.rows(), w_up.rows(), b_up.rows(),
                                    residual.rows(), none, none, 0, {}, alpha, Activation::kTanh, got_y.rows(), got_z.rows(), threads};
    const BottleneckBackward backward{n, d, r, d, g.rows(), x.rows(), got_z.rows(), w_down.rows(), w_up.rows(), b_up.rows(),
                                      none, none, 0, {}, alpha, Activation::kTanh, post, got_dx.rows(), got_dw_down.rows(),
                                      got_db_down.rows(), got_dw_up.rows(), got_db_up.rows(), none, none, threads};
    if (post) {
      Stored normal(n, d, dtype);
      kernels().adapter_norm_forward({forward, x.rows(), norm, normal.rows()});
      kernels().adapter_norm_backward({backward, norm, normal.rows(), got_dsum.rows(), got_dweight.rows(), got_dbias.rows()});
      compare(name + "dsum", got_dsum, du, allowed);
    } else {
      kernels().norm_adapter_forward({forward, norm});
      kernels().norm_adapter_backward({backward, norm, got_dweight.rows(), got_dbias.rows()});
    }
    const std::string which = name + (post ? "post " : "pre ");
    compare(which + "y", got_y, y, allowed);
    compare(which + "z", got_z, z, allowed);
    if (!rms) compare(which + "mean", got_mean, normalised.mean, allowed, 1);
    compare(which + "rstd", got_rstd, normalised.rstd, allowed);
    compare(which + "dx", got_dx, dx, allowed);
    compare(which + "dw_down", got_dw_down, dw_down, allowed);
    compare(which + "db_down", got_db_down, db_down, allowed);
    compare(which + "dw_up", got_dw_up, dw_up, allowed);
    compare(which + "db_up", got_db_up, db_up, allowed);
    compare(which + "dweight", got_dweight, dweight, allowed);
    compare(which + "dbias", got_dbias, dbias, allowed);
  }
}

}  // namespace

int main() {
  const Sizes sizes[] = {{1, 5, 1, 0}, {5, 33, 3, 7}, {17, 64, 16, 0}, {120, 100, 24, 3}};
  return in_every_isa([&](const std::string& isa) {
    for (const Sizes& s : sizes) {
      for (int threads : {1, 3}) {
        for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) run(isa, s, dtype, threads == 3, threads);
      }
    }
  });
}
