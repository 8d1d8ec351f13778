// Rows, vector by vector, and sums over rows, column by column: a few rows in float32, their sums in double, threads in
// order.
#pragma once

#include "blocks.h"

namespace petl::PETL_ISA {

// Asks for what a pass in order will read 6 KiB later: of 0.5 to 12 KiB the distance with the highest bandwidth, 79 GB/s
// against 57 without (two float32 operands of 12608 x 768, AVX-512, 2 cores). Past the end nothing happens.
PETL_INLINE void prefetch_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 6144); }

// The number of elements in a vector of a row: a constant but for the last, ragged one, of which lanes past the end
// are read as zero.
template <typename C>
using All = std::integral_constant<int64_t, kLanes<C>>;
template <typename C, typename Count>
constexpr bool kWhole = std::is_same_v<Count, All<C>>;

template <typename C, typename T, typename Count>
PETL_INLINE Vec<C> load(const T* p, Count lanes) {
  if constexpr (kWhole<C, Count>) return Storage<C, T>::load(p);
  return load_first<C, T>(p, lanes);
}
template <typename C, typename T, typename Count>
PETL_INLINE void store(T* p, Vec<C> v, Count lanes) {
  if constexpr (kWhole<C, Count>) return Storage<C, T>::store(p, v);
  return store_first<C, T>(p, v, lanes);
}
// Calls f(column, lanes) for each vector of a row.
template <typename C, typename F>
PETL_INLINE void for_columns(int64_t d, F f) {
  int64_t c = 0;
  for (; c + kLanes<C> <= d; c += kLanes<C>) f(c, All<C>{});
  if (c < d) f(c, d - c);
}

// totals[c] += sums[c], and the sums start again at zero: a few rows are added up in float32, the rest in double, so that
// the error does not grow with the number of rows.
template <typename C>
void flush_sums(C* sums, double* totals, int64_t d) {
  for (int64_t c = 0; c < d; ++c) {
    totals[c] += static_cast<double>(sums[c]);
    sums[c] = C(0);
  }
}

// The rows or segments of thread `index` of `count`, contiguous and nearly equal.
inline Range even_share(int64_t n, int index, int count) { return {n * index / count, n * (index + 1) / count}; }

// Threads for a pass over n rows of d elements that does little more than read them: one vector takes the time of about
// eight multiply-adds of a matrix product.
inline int streaming_threads(int threads, int64_t n, int64_t d) { return useful_threads(threads, n, n * d * 8); }

}  // namespace petl::PETL_ISA
