// Operands of the tensor cores, from tiles in shared memory. A step of a product is 32 bytes deep: k = 16 elements of 16
// bits or 8 floats; every loader fetches 16 rows of A (m) or 16 columns of B (n) for one step.
//
// Two forms of a tile: k contiguous (x, z, w_down [r, d_in] and w_up [d_out, r] in the forward) and k down the rows
// (both weights in the backward, and both operands of a weight's gradient). Of 16-bit elements ldmatrix fetches either,
// transposing on its way; it moves units of 16 bits, so that floats of the second form are fetched one by one.
#pragma once

#include "tiles.h"

namespace petl::cuda {

template <typename T>
constexpr int kDeep = 32 / static_cast<int>(sizeof(T));  // k of one step

struct OperandA {
  uint32_t r[4];
};
struct OperandB {
  uint32_t r[2][2];  // two neighbours, 8 columns each
};

PETL_DEVICE int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }

// A [m, k], k contiguous: rows m..m+15, step `step` of the tile.
template <typename T>
PETL_DEVICE void load_a(OperandA& a, unsigned char* tile, int m, int step) {
  const int lane = lane_of_thread();
  load_matrices(a.r, chunk_of(tile, m + lane % 16, 2 * step + lane / 16));
}

// A [k, m], m contiguous: rows k.. of the tile, columns m..m+15.
template <typename T>
PETL_DEVICE void load_a_transposed(OperandA& a, unsigned char* tile, int m, int k) {
  const int lane = lane_of_thread();
  if constexpr (sizeof(T) == 2) {
    load_matrices_transposed(a.r, chunk_of(tile, k + lane / 16 * 8 + lane % 8, m / 8 + lane / 8 % 2));
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.r[i] = *element_of<uint32_t>(tile, k + t + i / 2 * 4, m + g + i % 2 * 8);
  }
}

// B [n, k], k contiguous: rows n..n+15, step `step`.
template <typename T>
PETL_DEVICE void load_b(OperandB& b, unsigned char* tile, int n, int step) {
  const int lane = lane_of_thread();
  uint32_t r[4];
  load_matrices(r, chunk_of(tile, n + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
  b.r[0][0] = r[0], b.r[0][1] = r[1], b.r[1][0] = r[2], b.r[1][1] = r[3];
}

// B [k, n], n contiguous: rows k.., columns n..n+15.
template <typename T>
PETL_DEVICE void load_b_transposed(OperandB& b, unsigned char* tile, int n, int k) {
  const int lane = lane_of_thread();
  if constexpr (sizeof(T) == 2) {
    uint32_t r[4];
    load_matrices_transposed(r, chunk_of(tile, k + lane / 8 % 2 * 8 + lane % 8, n / 8 + lane / 16));
    b.r[0][0] = r[0], b.r[0][1] = r[1], b.r[1][0] = r[2], b.r[1][1] = r[3];
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) b.r[i / 2][i % 2] = *element_of<uint32_t>(tile, k + t + i % 2 * 4, n + g + i / 2 * 8);
  }
}

// One step of a vector, the same in every row of A (registers 2 i and 2 i + 1 take k[i]) or column of B: f(k) is element k.
template <typename T, typename F>
PETL_DEVICE void fill_operand(uint32_t (&k)[2], F&& f) {
  const int t = lane_of_thread() % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (sizeof(T) == 2) {
      const int at = 2 * t + 8 * i;
      const T low = from_float<T>(f(at)), high = from_float<T>(f(at + 1));
      k[i] = low.bits | static_cast<uint32_t>(high.bits) << 16;
    } else {
      k[i] = float_to_bits(f(t + 4 * i));
    }
  }
}

// A float as the sum of two tf32, to its last bit or but one. An infinity must meet the other operand once only: zero is
// its small part, and zero stands for it (`finite`) where it would meet the other's small part, zero as often as not.
struct Split {
  uint32_t big, small, finite;
};
PETL_DEVICE Split split(uint32_t bits) {
  const float value = bits_to_float(bits);
  const uint32_t big = to_tf32(value);
  const bool finite = (big & 0x7f800000u) != 0x7f800000u;
  return {big, finite ? to_tf32(value - bits_to_float(big)) : 0u, finite ? big : 0u};
}

// c += a b for 16 rows and kNeighbours (one or two) times 8 columns. Of floats in full precision four products, in tf32
// (`fast`) one. The four are added up by themselves, from the small to the large, and then to c by ordinary addition: tensor
// cores round every sum towards zero, which over a thousand rows would show.
template <typename T, int kNeighbours>
PETL_DEVICE void multiply(float (&c)[kNeighbours][4], const OperandA& a, const OperandB& b, bool fast) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < kNeighbours; ++j) mma<T>(c[j], a.r, b.r[j]);
  } else {
    uint32_t a_big[4], a_small[4], a_finite[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Split s = split(a.r[i]);
      a_big[i] = s.big, a_small[i] = s.small, a_finite[i] = s.finite;
    }
#pragma unroll
    for (int j = 0; j < kNeighbours; ++j) {
      uint32_t b_big[2], b_small[2], b_finite[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Split s = split(b.r[j][i]);
        b_big[i] = s.big, b_small[i] = s.small, b_finite[i] = s.finite;
      }
      if (fast) {
        mma<T>(c[j], a_big, b_big);
        continue;
      }
      float sum[4] = {};
      mma<T>(sum, a_small, b_small);
      mma<T>(sum, a_small, b_finite);
      mma<T>(sum, a_finite, b_small);
      mma<T>(sum, a_big, b_big);
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][i] += sum[i];
    }
  }
}

}  // namespace petl::cuda
