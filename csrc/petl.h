// What the kernels take: raw pointers, sizes, strides. Nothing here knows of torch or Python.
#pragma once

#include <cstdint>

namespace petl {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

enum class Activation : int { kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kLeakyRelu, kIdentity, kSoftmax };

// Rows of a matrix with contiguous elements, `stride` elements from one row to the next; data is null when absent.
// A vector is one row.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Elements are dropped with probability p, which ones being a function of *seed; absent where the seed is null.
struct Dropout {
  const int64_t* seed = nullptr;
  double p = 0;

  explicit operator bool() const { return seed != nullptr; }
};

// y = residual + gate * scale * (drop(act(x w_down^T + b_down)) w_up^T + b_up). The dtypes of x, parameters and y are
// independent, except that float64 mixes with nothing. `scale` has `scale_size` elements (1 or d_out) or is absent; alpha
// multiplies it. `gate`, when present, is n rows of one element. z, when present, receives the pre-activation, of a softmax
// its value.
struct BottleneckForward {
  int64_t n, d_in, r, d_out;
  Rows x, w_down, b_down, w_up, b_up, residual, scale, gate;
  int64_t scale_size;
  Dropout dropout;
  double alpha;
  Activation activation;
  Rows y, z;
  int threads;
};

// The gradients of the above, of which the absent ones are not computed. add_g: the residual was x, so dx includes g.
struct BottleneckBackward {
  int64_t n, d_in, r, d_out;
  Rows g, x, z, w_down, w_up, b_up, scale, gate;
  int64_t scale_size;
  Dropout dropout;
  double alpha;
  Activation activation;
  bool add_g;
  Rows dx, dw_down, db_down, dw_up, db_up, dscale, dgate;
  int threads;
};

// The parameters of one task's adapter, or their gradients, of which the absent ones are not computed.
struct Adapter {
  Rows w_down, b_down, w_up, b_up;
};

// y = residual + scale * (act(x w_down^T + b_down) w_up^T + b_up) for samples of `rows` rows each, those of sample s with
// the parameters adapters[task[s]], where task[s] is in [0, tasks).
struct AdapterBankForward {
  int64_t samples, rows, d_in, r, d_out, tasks;
  const int64_t* task;
  const Adapter* adapters;
  Rows x, residual;
  double scale;
  Activation activation;
  Rows y, z;
  int threads;
};

// The gradients of the above; gradients[t], contiguous, are zero where no sample has the task t.
struct AdapterBankBackward {
  int64_t samples, rows, d_in, r, d_out, tasks;
  const int64_t* task;
  const Adapter *adapters, *gradients;
  Rows g, x, z;
  double scale;
  Activation activation;
  bool add_g;
  Rows dx;
  int threads;
};

// dw [k, d] = picked^T dense over n rows, or its transpose [d, k], and db [k] = the sum of picked's rows; dw and db may
// be absent, dense then too. `picked` is the columns `channels` of a matrix, or its first k where that is null.
struct ChannelGradient {
  int64_t n, k, d;
  Rows picked;
  const int64_t* channels;
  Rows dense;
  bool transposed;
  Rows dw, db;
  int threads;
};

// y = x, but in the columns `channels` (k of them, distinct): y_C = x_C + s u, or, with scale_input, s x_C + u, where
// u = x_C weight^T + bias and s = alpha times the one element of `scale`, when present. y has x's dtype. x_channels,
// when present, receives x_C in rows of k.
struct ChannelAdapterForward {
  int64_t n, d, k;
  const int64_t* channels;
  Rows x, weight, bias, scale;
  double alpha;
  bool scale_input;
  Rows y, x_channels;
  int threads;
};

// The gradients of the above, of which the absent ones are not computed. g, dx and x_channels share one dtype.
struct ChannelAdapterBackward {
  int64_t n, d, k;
  const int64_t* channels;
  Rows g, x_channels, weight, bias, scale;
  double alpha;
  bool scale_input;
  Rows dx, dweight, dbias, dscale;
  int threads;
};

enum class Reduction : int { kSqBatch, kSqSample, kAbs };

// Scores [d] of channels from n rows of an activation and of its gradient: (sum a g)^2, the sum over samples of
// `sample_rows` rows of (sum a g)^2, or sum |a g|. Scores are float32, float64 for float64.
struct ChannelImportance {
  int64_t n, d, sample_rows;
  Rows activation, grad;
  Reduction reduction;
  Rows scores;
  int threads;
};

// y = x * scale over rows of d elements. y has x's dtype, the scale any other; float64 mixes with nothing.
struct ChannelScaleForward {
  int64_t n, d;
  Rows x, scale, y;
  int threads;
};

// The gradients of the above, of which the absent ones are not computed; g and x have one dtype. For dx alone x may be
// absent.
struct ChannelScaleBackward {
  int64_t n, d;
  Rows g, x, scale;
  Rows dx, dscale;
  int threads;
};

// y = (x - mean) rstd * weight + bias over rows of d elements, mean and rstd = 1 / sqrt(variance + eps) those of the row.
// Statistics, when present, are vectors of float32, float64 for float64; y has x's dtype, the parameters any other.
struct LayerNormForward {
  int64_t n, d;
  Rows x, weight, bias;
  double eps;
  Rows y, mean, rstd;
  int threads;
};

// The gradients of the above, of which the absent ones are not computed; g and x have one dtype. For dbias alone x and
// the statistics may be absent.
struct LayerNormBackward {
  int64_t n, d;
  Rows g, x, mean, rstd, weight;
  Rows dx, dweight, dbias;
  int threads;
};

// A normalisation of rows: (v - mean) rstd * weight + bias, with rstd = 1 / sqrt(variance + eps); `rms` takes no mean off, and
// rstd is 1 / sqrt(mean square + eps). Statistics are vectors of float32, float64 for float64: results of a forward, where
// present, and arguments of a backward that needs them; RMSNorm has no mean.
struct Norm {
  Rows weight, bias;
  double eps;
  bool rms;
  Rows mean, rstd;
};

// y = norm(hidden + residual + scale * up(act(down(x)))). `adapter` is the sum but for `hidden` (x itself in the sequential
// form); either term may be absent, both have the dtype of y. `normal`, when present, receives the normalised rows, before
// weight and bias.
struct AdapterNormForward {
  BottleneckForward adapter;
  Rows hidden;
  Norm norm;
  Rows normal;
};

// The gradients of the above, of which the absent ones are not computed. `dsum` is that of the sum, and so of every term of it; adapter.add_g: x was a term, so dx includes it.
struct AdapterNormBackward {
  BottleneckBackward adapter;
  Norm norm;
  Rows normal;
  Rows dsum, dweight, dbias;
};

// y = residual + scale * up(act(down(norm(x)))).
struct NormAdapterForward {
  BottleneckForward adapter;
  Norm norm;
};

// The gradients of the above, of which the absent ones are not computed.
struct NormAdapterBackward {
  BottleneckBackward adapter;
  Norm norm;
  Rows dweight, dbias;
};

// One tensor of an optimizer's step: a matrix of which everything, some rows or some columns are updated in place.
// rows x cols is what is updated; the states hold just that, contiguous, in the dtype of the parameter. Strides are in
// elements. `channels` names the rows or columns; a state or step that the optimizer does not have is null.
enum class Selection : int { kAll, kRows, kColumns };
struct ChannelTensor {
  void* param;
  const void* grad;
  void* states[2];
  float* step;
  const int64_t* channels;
  DType dtype;
  Selection selection;
  int64_t rows, cols, param_row, param_col, grad_row, grad_col;
};

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};
struct SGDOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

// A step over `count` tensors, each with its options. Gradients are divided by *grad_scale where it is given; where
// *found_inf is given and not zero, nothing happens.
template <typename Options>
struct ChannelStep {
  const ChannelTensor* tensors;
  const Options* options;
  int64_t count;
  const float *grad_scale, *found_inf;
  int threads;
};

}  // namespace petl
