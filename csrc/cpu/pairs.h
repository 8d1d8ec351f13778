// Operands of a product in the type P that it multiplies: the type C it computes in, or a Pair, two bf16 of successive k,
// where the instruction set has `vdpbf16ps`. A Pair is as large as the float it stands for, so that tiles and panels keep
// their sizes. The overloads for Pair round to bf16 what is wider, as eager PyTorch does between its operators.
#pragma once

#include <initializer_list>

#include "matrix.h"

namespace petl::PETL_ISA {

// Elements of k in one P, and how many P hold k elements.
template <typename P>
constexpr int64_t kPerStep = 1;
#if defined(__AVX512BF16__)
template <>
inline constexpr int64_t kPerStep<Pair> = 2;
#endif
template <typename P>
constexpr int64_t steps(int64_t k) {
  return (k + kPerStep<P> - 1) / kPerStep<P>;
}

// What rows of P hold in memory.
template <typename P>
struct ElementOf {
  using type = P;
};
#if defined(__AVX512BF16__)
template <>
struct ElementOf<Pair> {
  using type = bf16;
};
#endif
template <typename P>
using Element = typename ElementOf<P>::type;

// A row of P that a kernel writes element by element; `end_row` fills up the last P.
template <typename P>
PETL_INLINE Element<P>* elements(P* row) {
  return reinterpret_cast<Element<P>*>(row);
}
template <typename P>
PETL_INLINE void end_row(Element<P>* row, int64_t cols) {
  if (kPerStep<P> > 1 && cols % kPerStep<P>) row[cols] = {};
}

// The row stride, in P, of scratch for rows of `cols` elements.
template <typename P>
int64_t operand_stride(int64_t cols) {
  return scratch_stride<P>(steps<P>(cols));
}

// dst[i, :] = src[row + i, :cols] for `rows` rows.
template <typename C>
void copy_rows(const Rows& src, int64_t row, int64_t rows, int64_t cols, C* dst, int64_t ld) {
  widen(src, row, rows, cols, dst, ld);
}

// Element (k, j) of a panel; those of a column come in the order of k.
template <typename C>
PETL_INLINE void put(C* panel, int64_t k, int64_t j, C value) {
  panel[k * kTileCols<C> + j] = value;
}

#if defined(__AVX512BF16__)

constexpr int kPairs = kLanes<Pair>;

// All of these that are present.
inline bool are_bf16(std::initializer_list<Rows> matrices) {
  for (const Rows& m : matrices) {
    if (m && m.dtype != DType::kBFloat16) return false;
  }
  return true;
}

// 16 columns of two rows of bf16, from column `first` on, as pairs of both rows; then of two rows of floats.
PETL_INLINE __m512i interleave(__m512i low, __m512i high, int first) {
  alignas(64) uint16_t order[2 * kPairs];
  for (int i = 0; i < 2 * kPairs; ++i) order[i] = static_cast<uint16_t>(first + i / 2 + 2 * kPairs * (i % 2));
  return _mm512_permutex2var_epi16(low, _mm512_load_si512(order), high);
}
PETL_INLINE __m512i pair_up(Vec<float> low, Vec<float> high) {
  const __m512i both = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  alignas(64) uint16_t order[2 * kPairs];
  for (int i = 0; i < 2 * kPairs; ++i) order[i] = static_cast<uint16_t>(i / 2 + kPairs * (i % 2));
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}
// 32 floats of one row as pairs of successive ones.
PETL_INLINE __m512i pair_along(Vec<float> first, Vec<float> second) {
  return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}
// Lanes from `count` on are zero.
template <typename S>
PETL_INLINE Vec<float> load_up_to(const S* from, int64_t count) {
  if (count >= kPairs) return Storage<float, S>::load(from);
  return count > 0 ? load_first<float, S>(from, count) : Vec<float>{};
}

inline void copy_rows(const Rows& src, int64_t row, int64_t rows, int64_t cols, Pair* dst, int64_t ld) {
  with_storage<float>(src.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    for (int64_t i = 0; i < rows; ++i) {
      const S* from = static_cast<const S*>(src.data) + (row + i) * src.stride;
      for (int64_t c = 0; c < cols; c += 2 * kPairs) {
        const Vec<float> first = load_up_to(from + c, cols - c), second = load_up_to(from + c + kPairs, cols - c - kPairs);
        _mm512_storeu_si512(dst + i * ld + c / 2, pair_along(first, second));
      }
    }
  });
}

inline Operand<Pair> operand(const Rows& m, int64_t row, int64_t rows, int64_t cols, Pair* scratch) {
  const bool collide = m.stride * 2 % 4096 == 0;  // as in readable_in_place
  if (m.dtype == DType::kBFloat16 && m.stride % 2 == 0 && cols % 2 == 0 && !collide) {
    return {static_cast<const Pair*>(m.data) + row * m.stride / 2, m.stride / 2};
  }
  const int64_t ld = operand_stride<Pair>(cols);
  copy_rows(m, row, rows, cols, scratch, ld);
  return {scratch, ld};
}

inline void put(Pair* panel, int64_t k, int64_t j, float value) {
  const auto bits = static_cast<uint32_t>(narrow_bf16(splat(value))[0]);
  Pair& pair = panel[k / 2 * kTileCols<Pair> + j];
  pair.bits = k % 2 ? pair.bits | bits << 16 : bits;
}

inline void pack_transposed(const Rows& w, int64_t first, int64_t n, int64_t k, const float* scale, Pair* panel) {
  with_storage<float>(w.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    constexpr int64_t kDepth = 16 * kPairs;  // a part of the panel that stays in L1
    for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
      const int64_t end = k - k0 < kDepth ? k : k0 + kDepth;
      for (int64_t j = 0; j < kTileCols<Pair>; ++j) {
        const bool inside = first + j < n;
        const S* from = static_cast<const S*>(w.data) + (inside ? first + j : 0) * w.stride;
        const float s = !inside ? 0.0f : scale ? scale[first + j] : 1.0f;
        for (int64_t kk = k0; kk < end; kk += 2 * kPairs) {
          const Vec<float> low = load_up_to(from + kk, end - kk), high = load_up_to(from + kk + kPairs, end - kk - kPairs);
          const Bits pairs = inside ? bit_cast<Bits>(pair_along(low * s, high * s)) : Bits{};
          for (int64_t i = 0; i < kPairs && kk + 2 * i < end; ++i) panel[(kk / 2 + i) * kTileCols<Pair> + j].bits = pairs[i];
        }
      }
    }
  });
}

// Whole pairs of bf16 rows, unscaled: bits that only change places.
inline void pack_bf16_rows(const Rows& w, int64_t first, int64_t n, int64_t k, Pair* panel) {
  const int64_t width = n - first < 2 * kPairs ? n - first : 2 * kPairs;
  const auto inside = static_cast<__mmask32>((uint64_t{1} << width) - 1);
  for (int64_t kk = 0; kk < k; kk += 2, panel += kTileCols<Pair>) {
    const bf16* row = static_cast<const bf16*>(w.data) + kk * w.stride + first;
    // The next panel's part of these rows, which lie a stride apart: channel_linear takes 0.97 instead of 1.11 ms.
    __builtin_prefetch(row + 2 * kPairs);
    __builtin_prefetch(row + w.stride + 2 * kPairs);
    const __m512i low = _mm512_maskz_loadu_epi16(inside, row);
    const __m512i high = kk + 1 < k ? _mm512_maskz_loadu_epi16(inside, row + w.stride) : _mm512_setzero_si512();
    _mm512_storeu_si512(panel, interleave(low, high, 0));
    _mm512_storeu_si512(panel + kPairs, interleave(low, high, kPairs));
  }
}

inline void pack_rows(const Rows& w, int64_t first, int64_t n, int64_t k, const float* scale, Pair* panel) {
  if (w.dtype == DType::kBFloat16 && !scale) return pack_bf16_rows(w, first, n, k, panel);
  with_storage<float>(w.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    for (int64_t kk = 0; kk < k; kk += 2, panel += kTileCols<Pair>) {
      for (int64_t j = 0; j < kTileCols<Pair>; j += kPairs) {
        const auto row = [&](int64_t i) {
          const S* from = static_cast<const S*>(w.data) + i * w.stride + first + j;
          return i < k ? load_up_to(from, n - first - j) * (scale ? scale[i] : 1.0f) : Vec<float>{};
        };
        _mm512_storeu_si512(panel + j, pair_up(row(kk), row(kk + 1)));
      }
    }
  });
}

// Both of these work in place as well, since row i is written when nothing before row i or 2 i is left to read.
inline Operand<Pair> rounded(const float* from, int64_t rows, int64_t ld, int64_t cols, Pair* to) {
  copy_rows({const_cast<float*>(from), DType::kFloat32, ld}, 0, rows, cols, to, ld);
  return {to, ld};
}
inline const Pair* paired_rows(const float* from, int64_t rows, int64_t ld, int64_t cols, Pair* to) {
  for (int64_t i = 0; i < rows; i += 2) {
    const float* row = from + i * ld;
    for (int64_t j = 0; j < cols; j += kPairs) {
      const Vec<float> high = i + 1 < rows ? load_raw<Vec<float>>(row + ld + j) : Vec<float>{};
      _mm512_storeu_si512(to + i / 2 * ld + j, pair_up(load_raw<Vec<float>>(row + j), high));
    }
  }
  return to;
}

#endif

// A block of rows [rows, cols] of C as the left operand of a product over its columns; Pairs take its place.
template <typename P, typename C>
Operand<P> left_operand(C* block, int64_t rows, int64_t ld, int64_t cols) {
  if constexpr (std::is_same_v<C, P>) return {block, ld};
  else return rounded(block, rows, ld, cols, reinterpret_cast<P*>(block));
}
// The same of a product over its rows, its columns being the rows of the result; Pairs go to `to`, which may be `block`.
template <typename P, typename C>
const P* left_transposed(const C* block, int64_t rows, int64_t ld, int64_t cols, C* to) {
  if constexpr (std::is_same_v<C, P>) return block;
  else return paired_rows(block, rows, ld, cols, reinterpret_cast<P*>(to));
}

// sums[m, cols] (+)= a^T b over a block of rows, with `a` of left_transposed. What `sums` holds is added unless this is
// the first block. Rows of sums are whole panels; `panel` has room for one of b.
template <typename C, typename P>
void add_row_products(int64_t m, int64_t cols, int64_t rows, const P* a, int64_t lda, Operand<P> b, P* panel, C* sums,
                      bool first) {
  constexpr int64_t kCols = kTileCols<C>;
  const int64_t ld = round_up(cols, kCols);
  if constexpr (std::is_same_v<C, P>) {
    gemm<C, C, true>({m, ld, rows, a, lda, b.data, b.ld, kCols, sums, ld, first ? nullptr : sums, ld, nullptr});
  } else {
    const Rows source{const_cast<P*>(b.data), DType::kBFloat16, kPerStep<P> * b.ld};
    for (int64_t col = 0; col < ld; col += kCols, sums += kCols) {
      pack_rows(source, col, cols, rows, nullptr, panel);
      gemm<C, C, true, P>({m, kCols, steps<P>(rows), a, lda, panel, kCols, 0, sums, ld, first ? nullptr : sums, ld,
                           nullptr});
    }
  }
}

}  // namespace petl::PETL_ISA
