// The register-tiled matrix product under every kernel: out = A B (+ add) (+ bias).
//
// A tile of kTileRows x 2 vectors stays in registers while k runs; A is read by broadcast, straight from its rows (or
// from its columns, for the weight gradients), B by vectors, from panels of kTileCols columns. With 14 x 32 floats
// an AVX-512 core does 28 multiply-adds per 16 loads, with 6 x 16 an AVX2 core 12 per 8.
#pragma once

#include "simd.h"

namespace petl::PETL_ISA {

template <typename C>
PETL_INLINE void multiply_add(Vec<C>& acc, Vec<C> b, C a) {
  acc += b * a;
}

#if defined(__AVX512BF16__)
// Two bf16 of successive k in one operand: twice the multiply-adds per instruction. Read straight from rows of bf16, which
// may begin at any even address.
struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t bits;
};
template <>
struct VectorOf<Pair, kVectorBytes> {
  using type = Bits;
};
PETL_INLINE void multiply_add(Vec<float>& acc, Bits b, Pair a) {
  acc = _mm512_dpbf16_ps(acc, bit_cast<__m512bh>(b), bit_cast<__m512bh>(Bits{} + a.bits));
}
#endif

// One product [m, n] = [m, k] [k, n]. C is the type computed in, T that of `out` and `add`, P that of the operands.
template <typename C, typename T, typename P = C>
struct Product {
  int64_t m, n, k;
  const P* a;
  int64_t lda;
  const P* b;
  int64_t ldb;           // from one k to the next
  int64_t panel_stride;  // from one panel of kTileCols columns to the next
  T* out;
  int64_t ldo;
  const T* add;  // may be `out` (accumulate) or null
  int64_t ldadd;
  const C* bias;  // [n rounded up to kTileCols] or null
};

template <typename C, typename P, int kRows, int kVecs, bool kTransposedA>
PETL_INLINE void multiply(Vec<C> (&acc)[kRows][kVecs], int64_t k, const P* a, int64_t lda, const P* b, int64_t ldb) {
  for (int64_t kk = 0; kk < k; ++kk) {
    Vec<P> bv[kVecs];
    for (int j = 0; j < kVecs; ++j) bv[j] = load_raw<Vec<P>>(b + j * kLanes<C>);
    for (int i = 0; i < kRows; ++i) {
      const P ai = kTransposedA ? a[i] : a[i * lda];
      for (int j = 0; j < kVecs; ++j) multiply_add(acc[i][j], bv[j], ai);
    }
    a += kTransposedA ? lda : 1;
    b += ldb;
  }
}

// out = acc + bias (+ add) for a tile whose columns all exist. Unrolled, or GCC would spill every accumulator to index it.
template <bool kAdd, typename C, typename T, int kRows, int kVecs>
PETL_INLINE void store_tile(const Vec<C> (&acc)[kRows][kVecs], const Vec<C> (&bias)[kVecs], T* out, int64_t ldo,
                            const T* add, int64_t ldadd) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      Vec<C> v = acc[i][j] + bias[j];
      if (kAdd) v += Storage<C, T>::load(add + j * kLanes<C>);
      Storage<C, T>::store(out + j * kLanes<C>, v);
    }
    out += ldo;
    if (kAdd) add += ldadd;
  }
}

// The same for the last columns, where `left` (< kVecs vectors) of them exist.
template <typename C, typename T, int kRows, int kVecs>
void store_edge(const Vec<C> (&acc)[kRows][kVecs], const Vec<C> (&bias)[kVecs], T* out, int64_t ldo, const T* add,
                int64_t ldadd, int64_t left) {
  for (int j = 0; j < kVecs && left > 0; ++j, left -= kLanes<C>) {
    const int64_t count = left < kLanes<C> ? left : kLanes<C>;
    for (int i = 0; i < kRows; ++i) {
      Vec<C> v = acc[i][j] + bias[j];
      if (add) v += load_first<C, T>(add + i * ldadd + j * kLanes<C>, count);
      store_first<C, T>(out + i * ldo + j * kLanes<C>, v, count);
    }
  }
}

template <typename C, typename T, typename P, int kRows, int kVecs, bool kTransposedA>
void tile(const Product<C, T, P>& p, int64_t row, int64_t col, const P* b) {
  Vec<C> acc[kRows][kVecs] = {};
  multiply<C, P, kRows, kVecs, kTransposedA>(acc, p.k, p.a + (kTransposedA ? row : row * p.lda), p.lda, b, p.ldb);
  Vec<C> bias[kVecs] = {};
  for (int j = 0; j < kVecs && p.bias; ++j) bias[j] = load_raw<Vec<C>>(p.bias + col + j * kLanes<C>);
  T* out = p.out + row * p.ldo + col;
  const T* add = p.add ? p.add + row * p.ldadd + col : nullptr;
  if (p.n - col < kVecs * kLanes<C>) {
    store_edge<C, T>(acc, bias, out, p.ldo, add, p.ldadd, p.n - col);
  } else if (add) {
    store_tile<true, C, T>(acc, bias, out, p.ldo, add, p.ldadd);
  } else {
    store_tile<false, C, T>(acc, bias, out, p.ldo, add, p.ldadd);
  }
}

template <typename C, typename T, typename P, int kVecs, bool kTransposedA, int kRows = kTileRows>
PETL_INLINE void tile_of(int64_t rows, const Product<C, T, P>& p, int64_t row, int64_t col, const P* b) {
  if (rows == kRows) return tile<C, T, P, kRows, kVecs, kTransposedA>(p, row, col, b);
  if constexpr (kRows > 1) tile_of<C, T, P, kVecs, kTransposedA, kRows - 1>(rows, p, row, col, b);
}

// kTransposedA: `a` holds A^T, [k, m] with row stride lda.
template <typename C, typename T, bool kTransposedA = false, typename P = C>
void gemm(const Product<C, T, P>& p) {
  const int64_t tiles = (p.m + kTileRows - 1) / kTileRows;
  const P* b = p.b;
  for (int64_t col = 0; col < p.n; col += kTileCols<C>, b += p.panel_stride) {
    for (int64_t t = 0; t < tiles; ++t) {  // tiles of nearly equal height: 48 rows are 4 x 12, not 3 x 14 + 6
      const int64_t row = p.m * t / tiles, rows = p.m * (t + 1) / tiles - row;
      if (p.n - col > kLanes<C>) {
        tile_of<C, T, P, 2, kTransposedA>(rows, p, row, col, b);
      } else {
        tile_of<C, T, P, 1, kTransposedA>(rows, p, row, col, b);
      }
    }
  }
}

}  // namespace petl::PETL_ISA
