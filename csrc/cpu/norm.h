// What kernels that normalise rows share: sums over a row, its statistics, the parameters in the type we compute in.
#pragma once

#include <cmath>

#include "columns.h"

namespace petl::PETL_ISA {

template <typename C, typename Count>
PETL_INLINE Vec<C> zero_rest(Vec<C> v, Count lanes) {
  if constexpr (kWhole<C, Count>) return v;
  C buffer[kLanes<C>];
  std::memcpy(buffer, &v, sizeof(v));
  return load_first<C, C>(buffer, lanes);
}

// Calls f(column, lanes, sums) for each vector of a row and leaves in `totals` what f added to its kSums sums, which
// are kept in four chains: one would wait for each addition.
template <typename C, int kSums, typename F>
PETL_INLINE void sum_columns(int64_t d, C* totals, F f) {
  Vec<C> sums[4][kSums] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes<C> <= d; c += 4 * kLanes<C>) {
    f(c, All<C>{}, sums[0]);
    f(c + kLanes<C>, All<C>{}, sums[1]);
    f(c + 2 * kLanes<C>, All<C>{}, sums[2]);
    f(c + 3 * kLanes<C>, All<C>{}, sums[3]);
  }
  for (; c + kLanes<C> <= d; c += kLanes<C>) f(c, All<C>{}, sums[0]);
  if (c < d) f(c, d - c, sums[1]);
  for (int k = 0; k < kSums; ++k) {
    totals[k] = sum_lanes<C>((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
  }
}

// How a row is normalised: (v - mean - missing) rstd, where `missing` is what the mean, rounded as it is, lacks. Where
// |mean| is far above sigma that would be the largest error.
template <typename C>
struct Normal {
  C mean, missing, rstd;

  PETL_INLINE Vec<C> operator()(Vec<C> v) const { return (v - mean) * rstd - missing * rstd; }
};

// The statistics of a row whose mean is already known as well as one pass tells it; the second pass is in L1. RMSNorm takes
// no mean off, and its mean square is put together from both, which is exact to the last place where a sum of squares of
// rows far from zero is not.
template <typename C>
PETL_INLINE Normal<C> statistics_about(C mean, const C* row, int64_t d, double eps, bool rms) {
  C sums[2];
  sum_columns<C, 2>(d, sums, [&](int64_t c, auto lanes, Vec<C>* sum) {
    const Vec<C> v = zero_rest<C>(load<C>(row + c, lanes) - mean, lanes);
    sum[0] += v;
    sum[1] += v * v;
  });
  const C size = static_cast<C>(d), missing = sums[0] / size, variance = sums[1] / size - missing * missing;
  const C center = mean + missing;  // infinite of a row that is: so is its mean square
  const C square = rms ? center * center + (variance > 0 ? variance : C(0)) : variance < 0 ? C(0) : variance;
  const C rstd = C(1) / std::sqrt(square + static_cast<C>(eps));
  return {rms ? C(0) : mean, rms ? C(0) : missing, rstd};
}

template <typename C>
Normal<C> statistics(const C* row, int64_t d, double eps, bool rms) {
  C sum;
  sum_columns<C, 1>(d, &sum, [&](int64_t c, auto lanes, Vec<C>* sums) { sums[0] += load<C>(row + c, lanes); });
  return statistics_about(sum / static_cast<C>(d), row, d, eps, rms);
}

// A row in the type we compute in: in place, or widened into `scratch`.
template <typename C>
const C* values(const Rows& m, int64_t row, int64_t cols, C* scratch) {
  if (m.dtype == (sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32)) return at<const C>(m, row);
  widen(m, row, 1, cols, scratch, cols);
  return scratch;
}

// A parameter in the type we compute in, padded to whole vectors; an absent one has one value throughout.
template <typename C>
void fill_parameter(const Rows& parameter, int64_t d, C absent, C* values) {
  for (int64_t c = 0; c < round_up(d, kLanes<C>); ++c) values[c] = absent;
  if (parameter) widen(parameter, 0, 1, d, values, d);
}

}  // namespace petl::PETL_ISA
