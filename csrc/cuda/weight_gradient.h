// Products over the rows of tall matrices, P^T Q: the gradients of weights. A block takes 64 columns of P and two tiles'
// width of Q over one group of rows and writes its partial sum; `sum_groups` adds the groups in their order, so that
// every run gives the same bits. The sums of the columns of P and Q (the biases) come from the same operands: a column of
// ones beside P and one beside Q, which cost a product each and no memory. Where rows of Q have a gate it takes the place of
// the ones beside Q.
#pragma once

#include "mma.h"

namespace petl::cuda {

constexpr int kGroupRows = 32;  // of a stage
constexpr int kGradientRanks = 64;
constexpr int kGradientStages = 3;
template <typename T>
constexpr int kGradientWidth = 2 * kWidth<T>;

// Rows (q - mean) rstd weight + bias in the place of rows q; absent without rstd.
struct Normal {
  Source weight, bias;  // of one row each; may be absent
  Rows mean, rstd;      // the first may be absent
};

// out[group] [p_cols, q_cols] = P^T Q, element (k, c) at k out_k + c out_c; absent sums are not computed.
struct TallProduct {
  Source p, q;
  const int64_t* channels;  // the columns of P to take, or null: as they come
  float *out, *p_sum, *q_sum;
  int64_t out_k, out_c;
  Rows gate{};  // rows of one element, or absent
  Normal normal{};
};
struct TallProducts {
  int64_t n, group_rows;
  int count, tiles;  // products, and tiles of 64 ranks of each
  TallProduct products[2];
  bool fast;
};

constexpr int64_t kIndexBytes = kGradientRanks * 8;
template <typename T>
constexpr int64_t tall_shared_bytes() {
  return kGradientStages * (kGradientRanks / kWidth<T> + 2) * kGroupRows * kRowBytes + kIndexBytes;
}

// How many groups of rows, and of how many rows: two blocks per processor; but a group leaves partial sums behind, 4 bytes
// per element of the product, and should read at least as much: `least` rows.
struct Groups {
  int64_t count, rows;
};
inline Groups groups_of(int64_t n, int64_t tiles, int64_t least, int processors) {
  const int64_t wanted = cdiv(2 * processors, tiles > 0 ? tiles : 1), most = n / least;
  const int64_t count = wanted < most ? wanted : most > 1 ? most : 1;
  const int64_t rows = round_up(cdiv(n, count), kGroupRows);
  return {cdiv(n, rows), rows};
}

// A tile whose columns are gathered: `channels` are those of the tile, in shared memory, `count` of them there.
template <typename T>
PETL_DEVICE void load_gathered(unsigned char* tile, int height, const Source& m, int64_t row, const int64_t* channels,
                               int count) {
  for (int i = static_cast<int>(threadIdx.x); i < height * kChunks; i += kThreads) {
    const int down = i / kChunks, c = i % kChunks;
    Chunk<T> chunk;
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) {
      const int col = c * kChunk<T> + e;
      const bool inside = row + down < m.rows && col < count;
      chunk.values[e] = from_float<T>(inside ? load_float(m.data, m.dtype, (row + down) * m.stride + channels[col]) : 0.0f);
    }
    *reinterpret_cast<Chunk<T>*>(chunk_of(tile, down, c)) = chunk;
  }
}

// A thread's own chunk of a tile, as load_tile has shared them out, normalised in its place; before the others may read it.
template <typename T>
PETL_DEVICE void normalise_chunk(unsigned char* tile, const Source& m, const Normal& normal, int64_t row, int col) {
  static_assert(kGroupRows * kChunks == kThreads, "one chunk a thread");
  const int down = static_cast<int>(threadIdx.x) / kChunks, c = static_cast<int>(threadIdx.x) % kChunks;
  if (row + down >= m.rows) return;
  auto* const chunk = reinterpret_cast<Chunk<T>*>(chunk_of(tile, down, c));
  const float mean = normal.mean.data ? static_cast<const float*>(normal.mean.data)[row + down] : 0.0f;
  const float rstd = static_cast<const float*>(normal.rstd.data)[row + down];
  float weight[kChunk<T>], bias[kChunk<T>];
  load_floats(weight, normal.weight, 0, col + c * kChunk<T>, 1.0f);
  load_floats(bias, normal.bias, 0, col + c * kChunk<T>);
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) {
    chunk->values[e] = from_float<T>((to_float(chunk->values[e]) - mean) * rstd * weight[e] + bias[e]);
  }
}

template <typename T>
PETL_DEVICE uint32_t one() {
  if constexpr (sizeof(T) == 4) return 0x3f800000u;
  return DTypeOf<T>::value == DType::kBFloat16 ? 0x3f803f80u : 0x3c003c00u;
}

// Two blocks a processor, which `groups_of` counts on: all four steps of floats unrolled took 164 registers of 128.
template <typename T, bool kGather, bool kNormal = false>
__global__ void __launch_bounds__(kThreads, 2) tall_products_kernel(const __grid_constant__ TallProducts call) {
  constexpr int kAcross = 4, kDownTiles = 2;                      // 2 x 4 warps, each 32 ranks
  constexpr int kPairs = kGradientWidth<T> / 16 / kAcross;        // times 2 (16 bits) or 1 (floats) of 16 columns
  constexpr int kPTiles = kGradientRanks / kWidth<T>, kTile = kGroupRows * kRowBytes, kStage = (kPTiles + 2) * kTile;

  const TallProduct& product = call.products[blockIdx.y / static_cast<unsigned>(call.tiles)];
  const int rank_0 = static_cast<int>(blockIdx.y) % call.tiles * kGradientRanks;
  const int col_0 = static_cast<int>(blockIdx.x) * kGradientWidth<T>;
  if (!product.p.data || (col_0 >= product.q.cols && col_0 > 0)) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_of_thread();
  const int rank = warp / kAcross * 16 * kDownTiles, col = warp % kAcross * kPairs * 16;  // within the block's tile
  const int64_t group = blockIdx.z, begin = group * call.group_rows;
  const int64_t end = begin + call.group_rows < call.n ? begin + call.group_rows : call.n;
  const int steps = static_cast<int>(cdiv(end - begin, kGroupRows));
  const bool sums_p = product.p_sum && blockIdx.x == 0 && warp % kAcross == 0;
  const bool sums_q = product.q_sum && rank_0 == 0 && warp / kAcross == 0;

  int64_t* const channels = reinterpret_cast<int64_t*>(shared_memory() + kGradientStages * kStage);
  if constexpr (kGather) {
    const int k = rank_0 + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kGradientRanks && k < product.p.cols) channels[threadIdx.x] = product.channels[k];
    sync_block();
  }
  const auto load_rows = [&](int i) {
    unsigned char* const stage = shared_memory() + i % kGradientStages * kStage;
    const int64_t row = begin + static_cast<int64_t>(i) * kGroupRows;
#pragma unroll
    for (int t = 0; t < kPTiles; ++t) {
      const int k = t * kWidth<T>;
      if constexpr (kGather) {
        load_gathered<T>(stage + t * kTile, kGroupRows, product.p, row, channels + k, product.p.cols - rank_0 - k);
      } else {
        load_tile<T>(stage + t * kTile, kGroupRows, product.p, row, rank_0 + k);
      }
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      load_tile<T>(stage + (kPTiles + t) * kTile, kGroupRows, product.q, row, col_0 + t * kWidth<T>);
    }
  };
#pragma unroll
  for (int i = 0; i < kGradientStages - 1; ++i) {
    if (i < steps) load_rows(i);
    copy_async_commit();
  }

  float acc[kDownTiles][kPairs][2][4] = {}, p_sum[kDownTiles][2][4] = {}, q_sum[kPairs][2][4] = {};
  OperandA ones_a;
  OperandB ones_b;
#pragma unroll
  for (int i = 0; i < 4; ++i) ones_a.r[i] = ones_b.r[i / 2][i % 2] = one<T>();
  // A lane has the gate of one row of a stage, and asks for the next one a stage ahead.
  const bool gated = !kGather && sums_q && product.gate.data;
  const auto gate_in = [&](int i) {
    const int64_t row = begin + static_cast<int64_t>(i) * kGroupRows + lane;
    return row < end ? load_float(product.gate.data, product.gate.dtype, row * product.gate.stride) : 0.0f;
  };
  float gate_ahead = gated ? gate_in(0) : 0.0f;
  for (int i = 0; i < steps; ++i) {
    const float gate = gate_ahead;
    if (gated) gate_ahead = gate_in(i + 1);
    copy_async_wait<kGradientStages - 2>();
    unsigned char* const stage = shared_memory() + i % kGradientStages * kStage;
    if constexpr (kNormal) {
      for (int t = 0; t < 2 && product.normal.rstd.data; ++t) {
        const int64_t row = begin + static_cast<int64_t>(i) * kGroupRows;
        normalise_chunk<T>(stage + (kPTiles + t) * kTile, product.q, product.normal, row, col_0 + t * kWidth<T>);
      }
    }
    sync_block();
    if (i + kGradientStages - 1 < steps) load_rows(i + kGradientStages - 1);
    copy_async_commit();
#pragma unroll 2
    for (int k = 0; k < kGroupRows; k += kDeep<T>) {
      if (gated) {
        uint32_t gates[2];
        fill_operand<T>(gates, [&](int row) { return shuffle(gate, k + row); });
#pragma unroll
        for (int j = 0; j < 4; ++j) ones_a.r[j] = gates[j / 2];
      }
      OperandA a[kDownTiles];
#pragma unroll
      for (int m = 0; m < kDownTiles; ++m) {
        const int at = rank + 16 * m;
        load_a_transposed<T>(a[m], stage + at / kWidth<T> * kTile, at % kWidth<T>, k);
        if (sums_p) multiply<T>(p_sum[m], a[m], ones_b, call.fast);
      }
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int at = col + 16 * p;
        OperandB b;
        load_b_transposed<T>(b, stage + (kPTiles + at / kWidth<T>) * kTile, at % kWidth<T>, k);
        if (sums_q) multiply<T>(q_sum[p], ones_a, b, call.fast);
#pragma unroll
        for (int m = 0; m < kDownTiles; ++m) multiply<T>(acc[m][p], a[m], b, call.fast);
      }
    }
  }

  const int ranks = product.p.cols, cols = product.q.cols;
  float* const out = product.out ? product.out + group * ranks * cols : nullptr;
#pragma unroll
  for (int m = 0; m < kDownTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = rank_0 + rank + 16 * m + 8 * half + lane / 4;
      if (k >= ranks) continue;
      if (sums_p && lane % 4 == 0) product.p_sum[group * ranks + k] = p_sum[m][0][2 * half];
      if (!out) continue;
#pragma unroll
      for (int e = 0; e < 4 * kPairs; ++e) {
        const int c = col_0 + col + e / 2 * 8 + lane % 4 * 2 + e % 2;
        if (c < cols) out[k * product.out_k + c * product.out_c] = acc[m][e / 4][e / 2 % 2][e % 2 + 2 * half];
      }
    }
  }
  if (sums_q && lane / 4 == 0) {
#pragma unroll
    for (int e = 0; e < 4 * kPairs; ++e) {
      const int c = col_0 + col + e / 2 * 8 + lane % 4 * 2 + e % 2;
      if (c < cols) product.q_sum[group * cols + c] = q_sum[e / 4][e / 2 % 2][e % 2];
    }
  }
}

// The sum over the groups of element i, always in the same order.
PETL_DEVICE float sum_groups(const float* parts, int64_t groups, int64_t size, int64_t i) {
  float sum = 0;
  for (int64_t p = 0; p < groups; ++p) sum += parts[p * size + i];
  return sum;
}

}  // namespace petl::cuda
