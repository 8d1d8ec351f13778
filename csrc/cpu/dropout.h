// Dropout without a mask: whether an element is kept is a function of seed, row and column, evaluated again wherever it
// is asked for. Every implementation evaluates the same one (petl_kernels/ops/_dropout.py says it in PyTorch).
#pragma once

#include "../petl.h"
#include "simd.h"

namespace petl::PETL_ISA {

// The high and low words of the products a * b.
PETL_INLINE void multiply_wide(Bits a, uint32_t b, Bits& high, Bits& low) {
#if defined(__AVX512F__)
  const __m512i x = bit_cast<__m512i>(a), y = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  high = bit_cast<Bits>(_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd));
  low = bit_cast<Bits>(_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__)
  const __m256i x = bit_cast<__m256i>(a), y = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  high = bit_cast<Bits>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  low = bit_cast<Bits>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
  for (int i = 0; i < kLanes<float>; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32), low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Philox-4x32-10 (Salmon et al. 2011) of the counters (column, group, 0) under the key `seed`: word w of a counter
// belongs to row 4 group + w, so that a vector of columns spends all four.
PETL_INLINE void philox(uint64_t seed, Bits column, uint64_t group, Bits (&word)[4]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  word[0] = column, word[1] = Bits{} + static_cast<uint32_t>(group);
  word[2] = Bits{} + static_cast<uint32_t>(group >> 32), word[3] = Bits{};
  for (int round = 0; round < 10; ++round) {
    Bits high0, low0, high2, low2;
    multiply_wide(word[0], 0xd2511f53u, high0, low0);
    multiply_wide(word[2], 0xcd9e8d57u, high2, low2);
    word[0] = high2 ^ word[1] ^ key0, word[1] = low2;
    word[2] = high0 ^ word[3] ^ key1, word[3] = low0;
    key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
  }
}

// factors[i, k] for the elements (row + i, k), k < r: 0 where one is dropped, else 1 / (1 - p). Whole vectors of
// kLanes<float> columns are written.
template <typename C>
void dropout_factors(const Dropout& dropout, int64_t row, int64_t rows, int64_t r, C* factors, int64_t ld) {
  const auto seed = static_cast<uint64_t>(*dropout.seed);
  const auto threshold = static_cast<int32_t>(dropout.p * 2147483648.0);  // 31 bits: a signed comparison does
  const C factor = static_cast<C>(1 / (1 - dropout.p));
  Bits lane = {};
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int64_t group = row / 4; 4 * group < row + rows; ++group) {
    for (int64_t k = 0; k < r; k += kLanes<float>) {
      Bits word[4];
      philox(seed, lane + static_cast<uint32_t>(k), static_cast<uint64_t>(group), word);
      for (int w = 0; w < 4; ++w) {
        const int64_t i = 4 * group + w - row;
        if (i < 0 || i >= rows) continue;
        const auto kept = bit_cast<Vec<int32_t>>(word[w] >> 1) >= threshold;
        C* to = factors + i * ld + k;
        if constexpr (sizeof(C) == sizeof(float)) {
          const Bits bits = bit_cast<Bits>(splat(factor)) & bit_cast<Bits>(kept);
          std::memcpy(to, &bits, sizeof(bits));
        } else {
          for (int j = 0; j < kLanes<float>; ++j) to[j] = kept[j] ? factor : C(0);
        }
      }
    }
  }
}

// A dropped element is 0 whatever it was, NaN too.
template <typename C>
PETL_INLINE Vec<C> kept(Vec<C> value, Vec<C> factor) {
  return factor == Vec<C>{} ? Vec<C>{} : value * factor;
}

}  // namespace petl::PETL_ISA
