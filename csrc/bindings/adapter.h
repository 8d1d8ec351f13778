// What the two adapters with a norm take in common, on the CPU and on a GPU: sizes are (n, d_in, r, d_out).
#pragma once

#include "matrix.h"

using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;

inline BottleneckForward adapter(Sizes sizes, const Matrix& x, const Matrix& w_down, const Matrix& b_down, const Matrix& w_up,
                          const Matrix& b_up, const Matrix& residual, const Matrix& scale, int64_t scale_size,
                          double alpha, int activation, const Matrix& y, const Matrix& z, int threads) {
  const auto [n, d_in, r, d_out] = sizes;
  BottleneckForward f{};
  f.n = n, f.d_in = d_in, f.r = r, f.d_out = d_out;
  f.x = rows(x), f.w_down = rows(w_down), f.b_down = rows(b_down), f.w_up = rows(w_up), f.b_up = rows(b_up);
  f.residual = rows(residual), f.scale = rows(scale), f.scale_size = scale_size, f.alpha = alpha;
  f.activation = static_cast<Activation>(activation);
  f.y = rows(y), f.z = rows(z), f.threads = threads;
  return f;
}

inline BottleneckBackward adapter_gradients(Sizes sizes, const Matrix& g, const Matrix& x, const Matrix& z,
                                     const Matrix& w_down, const Matrix& w_up, const Matrix& b_up, const Matrix& scale,
                                     int64_t scale_size, double alpha, int activation, bool add_g, const Matrix& dx,
                                     const Matrix& dw_down, const Matrix& db_down, const Matrix& dw_up,
                                     const Matrix& db_up, const Matrix& dscale, int threads) {
  const auto [n, d_in, r, d_out] = sizes;
  BottleneckBackward b{};
  b.n = n, b.d_in = d_in, b.r = r, b.d_out = d_out;
  b.g = rows(g), b.x = rows(x), b.z = rows(z), b.w_down = rows(w_down), b.w_up = rows(w_up), b.b_up = rows(b_up);
  b.scale = rows(scale), b.scale_size = scale_size, b.alpha = alpha, b.activation = static_cast<Activation>(activation);
  b.add_g = add_g, b.dx = rows(dx), b.dw_down = rows(dw_down), b.db_down = rows(db_down), b.dw_up = rows(dw_up);
  b.db_up = rows(db_up), b.dscale = rows(dscale), b.threads = threads;
  return b;
}

inline Norm norm(const Matrix& weight, const Matrix& bias, double eps, bool rms, const Matrix& mean, const Matrix& rstd) {
  return {rows(weight), rows(bias), eps, rms, rows(mean), rows(rstd)};
}

// Each extension's own: both hold the same C++ types.
inline void bind_adapter(py::module_& m) {
  py::class_<BottleneckForward>(m, "Adapter", py::module_local()).def(py::init(&adapter));
  py::class_<BottleneckBackward>(m, "AdapterGradients", py::module_local()).def(py::init(&adapter_gradients));
  py::class_<Norm>(m, "Norm", py::module_local()).def(py::init(&norm));
}
