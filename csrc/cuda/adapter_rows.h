// The kernel by rows, which is the adapter's forward and the first launch of its backward. Both are two products with
// something small between:
//   forward   z  = x w_down^T + b_down,    h  = drop(act(z)),             y  = residual + gate s (h w_up^T + b_up)
//   backward  dh = (s g) w_up,             dz = gate drop(dh) act'(z),    dx = dz w_down (+ g)
// A block takes kBlockM rows. The wide matrix comes in slabs of 128 bytes a row; so do the weights, and all slabs of both
// phases pass through one ring of cp.async stages without a stop between the phases. Where what is added at the end is
// what came in (the sequential adapter) and the slabs of all columns fit, they stay: x is read once. 64 rows of 768
// columns are 96 KiB in 16 bits. Results take the place of the residual in its slab, and leave in whole sectors.
#pragma once

#include "bottleneck_rows.h"

namespace petl::cuda {

struct AdapterRows : Bottleneck {
  int d_from, d_to;  // columns of what comes in, of what comes out (0: nothing does)
  Source from, w_down, w_up, residual;  // x or g, ..., nothing or what is added
  bool resident;  // slabs of both phases have places of their own, the same for both; a residual is then `from`
  bool made;      // those of the first phase are there before it begins
  bool kept;      // those of the second stay where they are and are not written
  Rows b_down, b_up, scale;
  int scale_size;
  float alpha;
  bool vectors;   // rows of `to` begin on 16 bytes
  Rows to;        // y or dx
  float* dscale;  // backward: a float per block, sum of h (g w_up); may be absent
  bool fast;      // floats as tf32
};

// Stages of the ring: the weights of a wide bottleneck are 32 KiB each.
template <int kRanks>
constexpr int kStages = kRanks > 64 ? 2 : 3;

template <typename T>
int64_t weight_stage_bytes(int64_t r) {
  return round_up(r, kWidth<T>) * kRowBytes;  // of w_down r rows, of w_up kWidth rows in r / kWidth tiles
}
// Places for slabs of rows.
template <typename T>
PETL_BOTH int slab_slots(const AdapterRows& call, int stages) {
  const int slabs = static_cast<int>(cdiv(call.d_from, kWidth<T>)), out_slabs = static_cast<int>(cdiv(call.d_to, kWidth<T>));
  if (call.resident) return slabs > out_slabs ? slabs : out_slabs;
  return call.made && slabs > stages ? slabs : stages;
}
template <typename T>
int64_t adapter_shared_bytes(const AdapterRows& call, int64_t block_m, int stages) {
  const int64_t tiles = slab_slots<T>(call, stages) + cdiv(call.r, kWidth<T>);
  return tiles * block_m * kRowBytes + stages * weight_stage_bytes<T>(call.r) + (kWarps + block_m) * 4;
}

// `before` and `after` get the slabs, column c of a row in slab c / kWidth where they are resident or made, and 4 KiB that
// are free then.
template <typename T, int kRanks, int kBlockM, bool kBackward, typename Before, typename After>
PETL_DEVICE void adapter_rows(const AdapterRows& call, Before&& before, After&& after) {
  constexpr int kAcross = kWarps / (kBlockM / 16);             // warps side by side
  constexpr int kPairs = (kRanks / 16 + kAcross - 1) / kAcross;  // of 8 ranks, per warp
  constexpr int kOutPairs = kWidth<T> / 16 > kAcross ? kWidth<T> / 16 / kAcross : 1;
  constexpr int kSteps = kWidth<T> / kDeep<T>, kRing = kStages<kRanks>, kSlab = kBlockM * kRowBytes;
  constexpr int kSubTile = kWidth<T> * kRowBytes;  // of w_up: kWidth rows, as many ranks

  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_of_thread();
  const int down = warp / kAcross * 16, across = warp % kAcross;  // this warp's rows and its place beside the others
  const int64_t row_0 = static_cast<int64_t>(blockIdx.x) * kBlockM;
  const int r = call.r, pairs = (r + 15) / 16, ranks = 16 * pairs;
  const int slabs = static_cast<int>(cdiv(call.d_from, kWidth<T>)), out_slabs = static_cast<int>(cdiv(call.d_to, kWidth<T>));
  const int slots = slab_slots<T>(call, kRing);
  const int stage_bytes = static_cast<int>(cdiv(r, kWidth<T>)) * kSubTile;

  unsigned char* const slab_memory = shared_memory();
  unsigned char* const weights = slab_memory + slots * kSlab;
  unsigned char* const h_tile = weights + kRing * stage_bytes;  // kWidth ranks after the other
  float* const shares = reinterpret_cast<float*>(h_tile + cdiv(r, kWidth<T>) * kSlab);  // of dscale, one per warp
  float* const gated_bias = shares + kWarps;                                            // s g . b_up, one per row
  const void* const factors = kBackward && call.scale_size > 1 ? call.scale.data : nullptr;

  // Slab i of the sequence that both phases make up.
  const auto slab_of = [&](int i) {
    return slab_memory + (call.resident ? (i < slabs ? i : i - slabs) : i % slots) * kSlab;
  };
  const auto load_slab = [&](int i) {
    unsigned char* const stage = weights + i % kRing * stage_bytes;
    const bool first = i < slabs;
    const int col = (first ? i : i - slabs) * kWidth<T>;
    if (first) {
      if (!call.made) load_tile<T>(slab_of(i), kBlockM, call.from, row_0, col);
    } else if (call.residual.data && !call.resident) {
      load_tile<T>(slab_of(i), kBlockM, call.residual, row_0, col);
    }
    if (first != kBackward) {
      load_tile<T>(stage, ranks, call.w_down, 0, col);
    } else {
      for (int k = 0; k < r; k += kWidth<T>) {
        load_tile_scaled<T>(stage + k / kWidth<T> * kSubTile, kWidth<T>, call.w_up, col, k, factors, call.scale.dtype);
      }
    }
  };
  // Waits for slab i, and asks for the one whose place has just become free.
  const auto next_slab = [&](int i) {
    copy_async_wait<kRing - 2>();
    sync_block();
    if (i + kRing - 1 < slabs + out_slabs) load_slab(i + kRing - 1);
    copy_async_commit();
  };
  before(slab_memory, h_tile);
#pragma unroll
  for (int i = 0; i < kRing - 1; ++i) {
    if (i < slabs + out_slabs) load_slab(i);
    copy_async_commit();
  }

  // The first product, [kBlockM, r]. b_up's part of the gate's gradient is one more column, which only a gate asks for.
  const bool wants_bias = kBackward && call.dgate.data && call.b_up.data && across == 0;
  float acc[kPairs][2][4] = {}, bias[1][4] = {};
  for (int i = 0; i < slabs; ++i) {
    next_slab(i);
    unsigned char *const tile = slab_of(i), *const stage = weights + i % kRing * stage_bytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      OperandA a;
      load_a<T>(a, tile, down, step);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int rank = (p * kAcross + across) * 16;
        if (rank >= r) continue;
        OperandB b;
        if constexpr (kBackward) {
          load_b_transposed<T>(b, stage + rank / kWidth<T> * kSubTile, rank % kWidth<T>, step * kDeep<T>);
        } else {
          load_b<T>(b, stage, rank, step);
        }
        multiply<T>(acc[p], a, b, call.fast);
      }
      if (wants_bias) {
        OperandB b;
        const int64_t channel = static_cast<int64_t>(i) * kWidth<T> + step * kDeep<T>;
        fill_operand<T>(b.r[0], [&](int k) {
          if (channel + k >= call.d_from) return 0.0f;
          const float value = load_float(call.b_up.data, call.b_up.dtype, channel + k);
          return factors ? value * load_float(factors, call.scale.dtype, channel + k) : value;
        });
        multiply<T>(bias, a, b, call.fast);
      }
    }
  }

  // It goes to shared memory, rounded as eager rounds it: there a loop over its elements holds the activations' code once,
  // not once per accumulator.
  const float s = call.alpha * (call.scale_size == 1 ? load_float(call.scale.data, call.scale.dtype, 0) : 1.0f);
  const bool wants_dscale = kBackward && call.dscale;
  if (wants_dscale) {  // h, which the accumulators meet before they are scaled and rounded
    recompute_rows<T, kBlockM>(call, h_tile, row_0);
    sync_block();
  }
  float dscale = 0;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int rank = (p * kAcross + across) * 16;
    if (rank >= r) continue;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int col = rank + e / 4 * 8 + lane % 4 * 2 + e % 2, row = down + lane / 4 + e % 4 / 2 * 8;
      T* const at = rank_of<T, kBlockM>(h_tile, row, col);
      float value = acc[p][e / 4][e % 4];
      if constexpr (kBackward) {
        if (wants_dscale) dscale += row_0 + row < call.n && col < r ? value * to_float(*at) : 0.0f;
        value *= s;
      } else if (call.b_down.data && col < r) {
        value += load_float(call.b_down.data, call.b_down.dtype, col);
      }
      *at = from_float<T>(value);
    }
  }
  if (wants_bias && lane % 4 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) gated_bias[down + lane / 4 + half * 8] = s * bias[0][2 * half];
  }
  if (wants_dscale) {
    dscale = sum_warp(dscale);
    if (lane == 0) shares[warp] = dscale;
  }
  sync_block();
  if constexpr (kBackward) {
    differentiate_rows<T, kBlockM>(call, h_tile, row_0, call.b_up.data ? gated_bias : nullptr);
  } else {
    activate_rows<T, kBlockM>(call, h_tile, row_0);
  }
  if (wants_dscale && threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += shares[i];
    call.dscale[blockIdx.x] = sum;
  }

  // The second product, slab by slab.
  float gates[2] = {1, 1};  // of this lane's two rows
  if constexpr (!kBackward) {
#pragma unroll
    for (int half = 0; half < 2; ++half) gates[half] = gate_of(call.gate, row_0 + down + lane / 4 + half * 8, call.n);
  }
  for (int j = 0; j < out_slabs; ++j) {
    next_slab(slabs + j);
    unsigned char *const slab = slab_of(slabs + j), *const stage = weights + (slabs + j) % kRing * stage_bytes;
    const int first_col = across * kOutPairs * 16;
    if (first_col >= kWidth<T>) continue;  // more warps than columns
    float out[kOutPairs][2][4] = {};
    for (int step = 0; step * kDeep<T> < r; ++step) {
      OperandA a;
      load_a<T>(a, h_tile + step / kSteps * kSlab, down, step % kSteps);
#pragma unroll
      for (int p = 0; p < kOutPairs; ++p) {
        OperandB b;
        if constexpr (kBackward) {
          load_b_transposed<T>(b, stage, first_col + p * 16, step * kDeep<T>);
        } else {
          load_b<T>(b, stage + step / kSteps * kSubTile, first_col + p * 16, step % kSteps);
        }
        multiply<T>(out[p], a, b, call.fast);
      }
    }
#pragma unroll
    for (int p = 0; p < kOutPairs; ++p) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // two rows of each column
        const int col = first_col + p * 16 + e / 2 * 8 + lane % 4 * 2 + e % 2;
        const int64_t channel = static_cast<int64_t>(j) * kWidth<T> + col;
        float bias = 0, factor = 1;
        if (!kBackward && channel < call.d_to) {
          if (call.b_up.data) bias = load_float(call.b_up.data, call.b_up.dtype, channel);
          factor = call.scale_size > 1 ? call.alpha * load_float(call.scale.data, call.scale.dtype, channel) : s;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T* const at = element_of<T>(slab, down + lane / 4 + half * 8, col);
          float value = (out[p][e / 2][e % 2 + 2 * half] + bias) * factor * gates[half];
          if (call.residual.data) value += to_float(*at);
          *at = from_float<T>(value);
        }
      }
    }
    if (call.kept) continue;
    sync_warp();  // what follows is this warp's own part
    constexpr int kRowChunks = kOutPairs * 16 / kChunk<T>;
    for (int i = lane; i < 16 * kRowChunks; i += kWarp) {
      const int row = down + i / kRowChunks, c = first_col / kChunk<T> + i % kRowChunks;
      const int64_t n = row_0 + row, channel = static_cast<int64_t>(j) * kWidth<T> + c * kChunk<T>;
      if (n >= call.n || channel >= call.d_to) continue;
      T* const to = static_cast<T*>(call.to.data) + n * call.to.stride + channel;
      const auto* const chunk = reinterpret_cast<const Chunk<T>*>(chunk_of(slab, row, c));
      if (call.vectors && channel + kChunk<T> <= call.d_to) {
        *reinterpret_cast<Chunk<T>*>(to) = *chunk;
      } else {
        for (int e = 0; e < kChunk<T> && channel + e < call.d_to; ++e) to[e] = chunk->values[e];
      }
    }
  }
  after(slab_memory, h_tile);
}

template <typename T, int kRanks, int kBlockM, bool kBackward>
__global__ void __launch_bounds__(kThreads, kRanks > 64 ? 1 : 2) adapter_rows_kernel(const __grid_constant__ AdapterRows call) {
  const auto nothing = [](unsigned char*, unsigned char*) {};
  adapter_rows<T, kRanks, kBlockM, kBackward>(call, nothing, nothing);
}

}  // namespace petl::cuda
