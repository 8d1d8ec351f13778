// Sums over rows, column by column: a few rows in float32, their sums in double, threads in order.
#pragma once

#include "blocks.h"

namespace petl::PETL_ISA {

// Asks for what a pass in order will read 6 KiB later: of 0.5 to 12 KiB the distance with the highest bandwidth, 79 GB/s
// against 57 without (two float32 operands of 12608 x 768, AVX-512, 2 cores). Past the end nothing happens.
PETL_INLINE void prefetch_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 6144); }

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
