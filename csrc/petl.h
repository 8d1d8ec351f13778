// What the kernels take: raw pointers, sizes, strides. Nothing here knows of torch or Python.
#pragma once

#include <cstdint>

namespace petl {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

enum class Activation : int { kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kLeakyRelu, kIdentity };

// Rows of a matrix with contiguous elements, `stride` elements from one row to the next; data is null when absent.
// A vector is one row.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

// y = residual + scale * (act(x w_down^T + b_down) w_up^T + b_up). The dtypes of x, parameters and y are independent,
// except that float64 mixes with nothing. `scale` has `scale_size` elements (1 or d_out) or is absent; alpha multiplies
// it. z, when present, receives the pre-activation.
struct BottleneckForward {
  int64_t n, d_in, r, d_out;
  Rows x, w_down, b_down, w_up, b_up, residual, scale;
  int64_t scale_size;
  double alpha;
  Activation activation;
  Rows y, z;
  int threads;
};

// The gradients of the above, of which the absent ones are not computed. add_g: the residual was x, so dx includes g.
struct BottleneckBackward {
  int64_t n, d_in, r, d_out;
  Rows g, x, z, w_down, w_up, b_up, scale;
  int64_t scale_size;
  double alpha;
  Activation activation;
  bool add_g;
  Rows dx, dw_down, db_down, dw_up, db_up, dscale;
  int threads;
};

}  // namespace petl
