// What happens between the two products, to a tile [kBlockM, r] in shared memory: activation or softmax, dropout, and the
// derivative of both and of the gate. A warp has all of a row, so that sums over it stay in the warp. Everything is chosen
// at run time: it is asked once per element of N r, and compiled once per kernel.
#pragma once

#include "activation.h"
#include "dropout.h"
#include "mma.h"

namespace petl::cuda {

struct Bottleneck {
  int64_t n;
  int r;  // at most 256
  Activation activation;
  Keep dropout;
  Rows gate;   // rows of one element, or absent
  Rows z;      // written in the forward, unless absent, and read in the backward; of a softmax its value
  Rows dz, h;  // backward: for the gradients of the parameters; may be absent
  Rows dgate;  // backward: may be absent
};

// The element of a tile that is kWidth ranks after the other.
template <typename T, int kBlockM>
PETL_DEVICE T* rank_of(unsigned char* tile, int row, int rank) {
  return element_of<T>(tile + rank / kWidth<T> * kBlockM * kRowBytes, row, rank % kWidth<T>);
}
template <typename T>
PETL_DEVICE T* element_at(const Rows& m, int64_t n, int col) {
  return static_cast<T*>(m.data) + n * m.stride + col;
}

PETL_DEVICE float sum_warp(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
PETL_DEVICE float largest_of_warp(float value) {  // which passes over a NaN
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

PETL_DEVICE float gate_of(const Rows& gate, int64_t n, int64_t rows) {
  return gate.data && n < rows ? load_float(gate.data, gate.dtype, n * gate.stride) : 1.0f;
}

// f(row, kept) for every row of a block, by all of a warp. A lane's columns are lane, lane + 32, ..: bit 4 j of `kept` says
// whether dropout keeps the j-th of them. A warp takes four rows at a time, which share the counters.
template <int kBlockM, typename F>
PETL_DEVICE void each_row(const Bottleneck& call, int64_t row_0, F&& f) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int row = 4 * warp; row < kBlockM; row += 4 * kWarps) {
    uint32_t kept = ~0u;
    if (call.dropout.seed) {
      const auto seed = static_cast<uint64_t>(*call.dropout.seed), group = static_cast<uint64_t>(row_0 + row) / 4;
      kept = 0;
      int at = 0;
      for (int col = lane_of_thread(); col < call.r; col += kWarp, at += 4) {
        kept |= kept_of_four(seed, static_cast<uint32_t>(col), group, call.dropout.threshold) << at;
      }
    }
#pragma unroll 1
    for (int i = 0; i < 4; ++i) f(row + i, kept >> i);
  }
}

// f(element of the tile, column, bits) for this lane's columns of a row; zero becomes what lies outside of the matrix, as
// an infinite x times the zeros beside the weights is NaN. Bit 0 of `bits`: whether the element is kept.
template <typename T, int kBlockM, typename F>
PETL_DEVICE void each_column(const Bottleneck& call, unsigned char* tile, int row, bool inside, uint32_t bits, F&& f) {
  for (int col = lane_of_thread(); col < (call.r + 15) / 16 * 16; col += kWarp, bits >>= 4) {
    T* const at = rank_of<T, kBlockM>(tile, row, col);
    if (inside && col < call.r) {
      f(at, col, bits);
    } else {
      *at = from_float<T>(0.0f);
    }
  }
}

// z becomes h = drop(act(z)).
template <typename T, int kBlockM>
PETL_DEVICE void activate_rows(const Bottleneck& call, unsigned char* tile, int64_t row_0) {
  each_row<kBlockM>(call, row_0, [&](int row, uint32_t kept) {
    const int64_t n = row_0 + row;
    const bool softmax = call.activation == Activation::kSoftmax;
    float top = -INFINITY, sum = 0;
    if (softmax) {
      const auto z = [&](int col) { return to_float(*rank_of<T, kBlockM>(tile, row, col)); };
      for (int col = lane_of_thread(); col < call.r; col += kWarp) top = fmaxf(top, z(col));
      top = largest_of_warp(top);
      for (int col = lane_of_thread(); col < call.r; col += kWarp) sum += expf(z(col) - top);
      sum = sum_warp(sum);
    }
    each_column<T, kBlockM>(call, tile, row, n < call.n, kept, [&](T* at, int col, uint32_t bits) {
      float z = to_float(*at);
      if (softmax) z = expf(z - top) / sum;
      if (call.z.data) *element_at<T>(call.z, n, col) = from_float<T>(z);
      *at = from_float<T>(bits & 1 ? activate(z, call.activation).value * call.dropout.factor : 0.0f);
    });
  });
}

// h, dropped and gated, from z in global memory.
template <typename T, int kBlockM>
PETL_DEVICE void recompute_rows(const Bottleneck& call, unsigned char* tile, int64_t row_0) {
  each_row<kBlockM>(call, row_0, [&](int row, uint32_t kept) {
    const int64_t n = row_0 + row;
    const float factor = call.dropout.factor * gate_of(call.gate, n, call.n);
    each_column<T, kBlockM>(call, tile, row, n < call.n, kept, [&](T* at, int col, uint32_t bits) {
      const float z = to_float(*element_at<T>(call.z, n, col));
      *at = from_float<T>(bits & 1 ? activate(z, call.activation).value * factor : 0.0f);
    });
  });
}

// dh = (s g) w_up becomes dz = gate drop(dh) act'(z); h, dropped and gated, goes to global memory. Of a softmax
// dz = gate h (drop(dh) - h . drop(dh)). The gate's gradient is act(z) . drop(dh) and, of b_up, `bias`: one per row.
template <typename T, int kBlockM>
PETL_DEVICE void differentiate_rows(const Bottleneck& call, unsigned char* tile, int64_t row_0, const float* bias) {
  each_row<kBlockM>(call, row_0, [&](int row, uint32_t kept) {
    const int64_t n = row_0 + row;
    const bool inside = n < call.n, softmax = call.activation == Activation::kSoftmax;
    const float gate = gate_of(call.gate, n, call.n);
    const auto put = [&](T* at, int col, float dz) {
      *at = from_float<T>(dz);
      if (call.dz.data) *element_at<T>(call.dz, n, col) = *at;
    };
    float dot = 0;
    each_column<T, kBlockM>(call, tile, row, inside, kept, [&](T* at, int col, uint32_t bits) {
      const Activated act = activate(to_float(*element_at<T>(call.z, n, col)), call.activation);
      const float dh = bits & 1 ? to_float(*at) * call.dropout.factor : 0.0f;
      dot += act.value * dh;
      if (!softmax) put(at, col, dh * act.slope * gate);
      if (!call.h.data) return;
      *element_at<T>(call.h, n, col) = from_float<T>(bits & 1 ? act.value * call.dropout.factor * gate : 0.0f);
    });
    if (!softmax && !call.dgate.data) return;
    dot = sum_warp(dot);
    if (softmax) {
      each_column<T, kBlockM>(call, tile, row, inside, kept, [&](T* at, int col, uint32_t bits) {
        const float dh = bits & 1 ? to_float(*at) * call.dropout.factor : 0.0f;
        put(at, col, (dh - dot) * to_float(*element_at<T>(call.z, n, col)) * gate);
      });
    }
    if (call.dgate.data && inside && lane_of_thread() == 0) {
      store_float(call.dgate.data, call.dgate.dtype, n * call.dgate.stride, bias ? dot + bias[row] : dot);
    }
  });
}

}  // namespace petl::cuda
