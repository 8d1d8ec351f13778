// A gradient of chosen channels: its operands, and what it has to be by a plain loop in double.
#pragma once

#include "testing.h"

struct GradientSizes {
  int64_t n, k, d, gap;
};

struct GradientCase {
  Stored picked, dense;
  std::vector<int64_t> channels;
  Values dw, db;
};

// With `gather` the channels are among more columns than k; `transposed` is the gradient [d, k] of input columns.
inline GradientCase gradient_case(const GradientSizes& s, DType picked_dtype, DType dense_dtype, bool transposed,
                                  bool gather) {
  std::mt19937 rng(static_cast<unsigned>(s.n * 31 + s.k * 7 + s.d));
  const int64_t width = gather ? 2 * s.k + 1 : s.k;
  // Operands of two dtypes are multiplied in float: one of floats holds what no 16 bits do.
  const auto offset = [&](DType dtype) { return picked_dtype != dense_dtype && dtype == DType::kFloat32 ? 1.0 / 4096 : 0; };
  GradientCase c{{rng, s.n, width, picked_dtype, s.gap, offset(picked_dtype)},
                 {rng, s.n, s.d, dense_dtype, s.gap, offset(dense_dtype)}, choose(rng, s.k, width),
                 Values(static_cast<size_t>(s.k * s.d)), Values(static_cast<size_t>(s.k))};
  for (int64_t i = 0; i < s.n; ++i) {
    for (int64_t j = 0; j < s.k; ++j) {
      const double value = c.picked(i, gather ? c.channels[static_cast<size_t>(j)] : j);
      c.db[static_cast<size_t>(j)] += value;
      for (int64_t col = 0; col < s.d; ++col) {
        c.dw[static_cast<size_t>(transposed ? col * s.k + j : j * s.d + col)] += value * c.dense(i, col);
      }
    }
  }
  return c;
}
