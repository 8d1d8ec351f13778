// Blocks of rows: how many a thread takes at once, how many threads pay, products over a deep k, ordered sums.
#pragma once

#include <omp.h>

#include "pairs.h"

namespace petl::PETL_ISA {

constexpr int64_t kDepthBlock = 256;  // of k, so that a panel (256 x kTileCols) stays in L1
// MKL sums products of few columns (not wider ones) in vectors along k: one chain over k = 96 had 1.6 times its error,
// pieces of 32 have 1.05 times. Not so above kDepthBlock: a pass over the rows for each 32 of k = 1024 took 40 % (AVX2).
constexpr int64_t kNarrow = 16, kNarrowDepth = 32;

// Rows that a thread takes through all phases at once: tiles of 256 KB of x and of g leave room in a 1 MB L2 for the
// weights. Fewer than 48 rows would spend the time on reading and writing the weight gradients (12 rows: 14 % slower at
// d = 4096, AVX2), more than 96 gain nothing.
inline int64_t block_rows(int64_t d) {
  const int64_t rows = (int64_t{256} << 10) / (d * static_cast<int64_t>(sizeof(float)));
  return round_up(rows < 48 ? 48 : rows > 96 ? 96 : rows, kTileRows);
}

inline int useful_threads(int threads, int64_t n, int64_t multiply_adds) {
  // A team costs about 2 us, 2^18 multiply-adds 4 us of one core: a thread for less than that does not pay.
  const int64_t by_work = kEveryThreadPays ? threads : multiply_adds >> 18;
  const int64_t by_rows = (n + kTileRows - 1) / kTileRows;
  const int64_t most = by_work < by_rows ? by_work : by_rows;
  return static_cast<int>(most < 1 ? 1 : most < threads ? most : threads);
}

// Calls f(row, rows, first) for each block of this thread's share of n rows; tells whether it has any.
template <typename F>
bool for_blocks(int64_t n, int64_t block, F f) {
  const Range range = share(n, omp_get_thread_num(), omp_get_num_threads());  // the team may be smaller than asked for
  for (int64_t row = range.begin; row < range.end; row += block) {
    f(row, range.end - row < block ? range.end - row : block, row == range.begin);
  }
  return range.begin < range.end;
}

// out = a panels (+ bias) (+ add), with the k steps cut into pieces accumulated in `out`: short ones where that is asked
// for.
template <typename C, typename P>
void deep_product(int64_t m, int64_t n, int64_t k, Operand<P> a, const P* panels, C* out, int64_t ldo, const C* bias,
                  Operand<C> add = {}, bool accurate = false) {
  const int64_t piece = k <= kDepthBlock && (accurate || n <= kNarrow) ? kNarrowDepth : kDepthBlock;
  for (int64_t k0 = 0; k0 < k; k0 += piece) {
    const int64_t depth = k - k0 < piece ? k - k0 : piece;
    gemm<C, C, false, P>({m, n, depth, a.data + k0, a.ld, panels + k0 * kTileCols<C>, kTileCols<C>, k * kTileCols<C>, out,
                          ldo, k0 ? out : add.data, k0 ? ldo : add.ld, k0 ? nullptr : bias});
  }
}

// Adds the threads' partial sums in their order: sums[i] = sum_t partials[t][i] for `count` of them, which may be in place.
template <typename C>
void sum_partials(const C* partials, int64_t distance, int threads, int64_t count, C* sums) {
  if (sums != partials) std::memcpy(sums, partials, sizeof(C) * static_cast<size_t>(count));
  for (int t = 1; t < threads; ++t) {
    const C* more = partials + t * distance;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) sums[i] += more[i];
  }
}

}  // namespace petl::PETL_ISA
