// A norm beside the adapter by rows (adapter_rows.h), which makes the matrix that the products begin with, or takes over
// the one they end with:
//   post-norm  forward   after them   u = hidden + residual + branch,  xh = (u - mean) rstd,  y = xh weight + bias
//              backward  before them  du = rstd (gw - mean(gw) - xh mean(gw xh)) with gw = g weight
//   pre-norm   forward   before them  u = xh weight + bias of xh = (x - mean) rstd
//              backward  after them   dx = the same of gw = du weight with du = dz w_down
// So there is one pass in each direction over the rows of a block, which stay in shared memory where they fit and in
// `scratch` where they do not. A thread has the same rows in all slabs, 16 bytes of each, eight threads a row: sums over a
// row are its registers and three shuffles.
#pragma once

#include "adapter_rows.h"

namespace petl::cuda {

struct NormRows {
  AdapterRows adapter;
  bool post;
  Rows scratch;         // rows on 16 bytes; absent where a block's rows are in shared memory
  Source weight, bias;  // of one row each; may be absent
  float eps;
  bool rms;
  Rows mean, rstd;  // of floats: results of a forward, unless absent, arguments of a backward
  // Post-norm: the terms of the sum beside the branch, either may be absent, and y and xh; backward g and xh, and du.
  // Pre-norm: x; backward x and what dx includes beside, and dx.
  Source in[2];
  Rows out[2];  // may be absent
  bool vectors[2];
  float* parts;  // backward, or absent: of every block sum g xh, sum g (of the pre-norm du for g), two rows of d
};

// The rows of a block between norm and products, 16 bytes at a time, zero outside.
template <typename T, int kBlockM>
struct BlockRows {
  unsigned char* slabs;
  Rows scratch;
  int64_t row_0, n;

  PETL_DEVICE Chunk<T>* at(int row, int col) const {
    if (!scratch.data) {
      return reinterpret_cast<Chunk<T>*>(
          chunk_of(slabs + col / kWidth<T> * kBlockM * kRowBytes, row, col % kWidth<T> / kChunk<T>));
    }
    if (row_0 + row >= n || col >= scratch.stride) return nullptr;
    return reinterpret_cast<Chunk<T>*>(static_cast<T*>(scratch.data) + (row_0 + row) * scratch.stride + col);
  }
  PETL_DEVICE void get(float (&values)[kChunk<T>], int row, int col) const {
    const Chunk<T>* const chunk = at(row, col);
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) values[e] = chunk ? to_float(chunk->values[e]) : 0.0f;
  }
  // And leaves in `values` what is read again.
  PETL_DEVICE void put(float (&values)[kChunk<T>], int row, int col) const {
    Chunk<T> chunk;
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) {
      chunk.values[e] = from_float<T>(values[e]);
      values[e] = to_float(chunk.values[e]);
    }
    if (Chunk<T>* const to = at(row, col)) *to = chunk;
  }
};

constexpr int kRowsAtOnce = kThreads / kChunks;

// f(i, row, col) for the chunks of a thread: its i-th row, from `col` on.
template <typename T, int kBlockM, typename F>
PETL_DEVICE void each_chunk(int slab, F&& f) {
  const int t = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kBlockM / kRowsAtOnce; ++i) {
    f(i, t / kChunks + i * kRowsAtOnce, slab * kWidth<T> + t % kChunks * kChunk<T>);
  }
}
template <int kBlockM>
PETL_DEVICE int64_t row_of_thread(int i) {
  return static_cast<int64_t>(blockIdx.x) * kBlockM + static_cast<int>(threadIdx.x) / kChunks + i * kRowsAtOnce;
}
PETL_DEVICE float sum_of_row(float value) {
  for (int mask = kChunks / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// get(v, row, col, first) gives the rows of d elements, a second and third time with `first` false; put(value, xh, row,
// col) takes xh weight + bias and xh. The second pass finds what the rounded mean lacks, so that rows far from zero lose
// nothing; the mean square of RMSNorm is mean^2 + variance. One loop for all passes: their loads are most of the code.
template <typename T, int kBlockM, typename Get, typename Put>
PETL_DEVICE void normalise_rows(const NormRows& call, int d, Get&& get, Put&& put) {
  constexpr int kRows = kBlockM / kRowsAtOnce, kCount = kChunk<T>;
  const int slabs = static_cast<int>(cdiv(d, kWidth<T>));
  const float size = static_cast<float>(d);
  float mean[kRows] = {}, missing[kRows] = {}, rstd[kRows] = {};
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    float sum[kRows] = {}, square[kRows] = {};
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab) {
      float weight[kCount] = {}, bias[kCount] = {};
      if (pass == 2) {
        each_chunk<T, kRowsAtOnce>(slab, [&](int, int, int col) {
          load_floats(weight, call.weight, 0, col, 1.0f), load_floats(bias, call.bias, 0, col);
        });
      }
      each_chunk<T, kBlockM>(slab, [&](int i, int row, int col) {
        float v[kCount], value[kCount];
        get(v, row, col, pass == 0);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const float deviation = col + e < d ? v[e] - mean[i] : 0.0f;
          sum[i] += deviation, square[i] += deviation * deviation;
          v[e] = deviation * rstd[i] - missing[i] * rstd[i];
          value[e] = v[e] * weight[e] + bias[e];  // behind the last column too, where it meets zeros of the weights
        }
        if (pass == 2) put(value, v, row, col);
      });
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i] = sum_of_row(sum[i]) / size, square[i] = sum_of_row(square[i]) / size;
      if (pass == 0) mean[i] = sum[i];
      if (pass == 1) {
        const float rest = square[i] - sum[i] * sum[i], center = mean[i] + sum[i];
        const float variance = rest < 0 ? 0.0f : rest;  // NaN stays
        rstd[i] = 1.0f / sqrtf((call.rms ? center * center + (variance > 0 ? variance : 0.0f) : variance) + call.eps);
        missing[i] = call.rms ? 0.0f : sum[i], mean[i] = call.rms ? 0.0f : mean[i];
        const int64_t row = row_of_thread<kBlockM>(i);
        if (threadIdx.x % kChunks == 0 && row < call.adapter.n) {
          if (call.mean.data) static_cast<float*>(call.mean.data)[row] = center;
          if (call.rstd.data) static_cast<float*>(call.rstd.data)[row] = rstd[i];
        }
      }
    }
  }
}

// The columns of a slab, summed over a warp's rows and then over the warps in their order.
template <typename T>
PETL_DEVICE void sum_columns(float* parts, int d, int slab, unsigned char* spare, float (&of_weight)[kChunk<T>],
                             float (&of_bias)[kChunk<T>]) {
  constexpr int kSums = 2 * kWidth<T>;
  const int t = static_cast<int>(threadIdx.x), lane = lane_of_thread();
  float* const sums = reinterpret_cast<float*>(spare);
  float* const own = sums + t / kWarp * kSums + lane % kChunks * kChunk<T>;
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) {
    for (int mask = kChunks; mask < kWarp; mask *= 2) {
      of_weight[e] += shuffle_xor(of_weight[e], mask), of_bias[e] += shuffle_xor(of_bias[e], mask);
    }
    if (lane < kChunks) own[e] = of_weight[e], own[kWidth<T> + e] = of_bias[e];
  }
  sync_block();
  const int channel = slab * kWidth<T> + t % kWidth<T>;
  if (t < kSums && channel < d) {
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp * kSums + t];
    parts[(static_cast<int64_t>(blockIdx.x) * 2 + t / kWidth<T>) * d + channel] = sum;
  }
  sync_block();
}

// get(g, xh, i, row, col, first) gives the gradient of the norm's result and the normalised rows; put(value, row, col)
// takes that of its rows, where it is wanted. `spare`: 4 KiB of shared memory.
template <typename T, int kBlockM, typename Get, typename Put>
PETL_DEVICE void differentiate_norm(const NormRows& call, int d, bool wanted, unsigned char* spare, Get&& get, Put&& put) {
  constexpr int kRows = kBlockM / kRowsAtOnce, kCount = kChunk<T>;
  const int slabs = static_cast<int>(cdiv(d, kWidth<T>));
  const float size = static_cast<float>(d);
  float offset[kRows] = {}, slope[kRows] = {}, rstd[kRows] = {};
#pragma unroll 1
  for (int pass = 0; pass < (wanted ? 2 : 1); ++pass) {
    float sums[kRows][2] = {};
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab) {
      float weight[kCount], of_weight[kCount] = {}, of_bias[kCount] = {};
      each_chunk<T, kRowsAtOnce>(slab, [&](int, int, int col) { load_floats(weight, call.weight, 0, col, 1.0f); });
      each_chunk<T, kBlockM>(slab, [&](int i, int row, int col) {
        float g[kCount], xh[kCount];
        get(g, xh, i, row, col, pass == 0);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const float gw = g[e] * weight[e];
          of_weight[e] += g[e] * xh[e], of_bias[e] += g[e];
          sums[i][0] += gw, sums[i][1] += gw * xh[e];
          g[e] = rstd[i] * (gw - offset[i] - xh[e] * slope[i]);
        }
        if (pass == 1) put(g, row, col);
      });
      if (pass == 0 && call.parts) sum_columns<T>(call.parts, d, slab, spare, of_weight, of_bias);
    }
    if (pass == 1) break;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = row_of_thread<kBlockM>(i);
      rstd[i] = row < call.adapter.n ? static_cast<const float*>(call.rstd.data)[row] : 0.0f;
      offset[i] = call.rms ? 0.0f : sum_of_row(sums[i][0]) / size;
      slope[i] = sum_of_row(sums[i][1]) / size;
    }
  }
}

// Post-norm, forward: y and the normalised rows from what the products leave of the sum.
template <typename T, int kBlockM>
PETL_DEVICE void normalise_sum(const NormRows& call, const BlockRows<T, kBlockM>& block) {
  constexpr int kCount = kChunk<T>;
  const int d = call.adapter.d_to;
  // In y's own dtype the sum is rounded once and read back; else, in float32 beside 16 bits, formed again.
  const bool settled = call.out[0].dtype == DTypeOf<T>::value;
  const auto sum = [&](float (&v)[kCount], int row, int col, bool first) {
    block.get(v, row, col);
    if (!first && settled) return;
    float term[kCount];
#pragma unroll 1
    for (int k = 0; k < 2; ++k) {
      load_floats(term, call.in[k], block.row_0 + row, col);
#pragma unroll
      for (int e = 0; e < kCount; ++e) v[e] += term[e];
    }
    if (settled) block.put(v, row, col);
  };
  normalise_rows<T, kBlockM>(call, d, sum, [&](auto& y, auto& xh, int row, int col) {
    if (block.row_0 + row >= block.n) return;
    store_floats(call.out[0], call.vectors[0], block.row_0 + row, col, d, y);
    if (call.out[1].data) store_floats(call.out[1], call.vectors[1], block.row_0 + row, col, d, xh);
  });
}

// Pre-norm, forward: the rows that the products begin with.
template <typename T, int kBlockM>
PETL_DEVICE void normalise_x(const NormRows& call, const BlockRows<T, kBlockM>& block) {
  const auto x = [&](float (&v)[kChunk<T>], int row, int col, bool first) {
    if (!first) return block.get(v, row, col);
    load_floats(v, call.in[0], block.row_0 + row, col);
    block.put(v, row, col);
  };
  const auto keep = [&](auto& u, auto&, int row, int col) { block.put(u, row, col); };
  normalise_rows<T, kBlockM>(call, call.adapter.d_from, x, keep);
}

// Post-norm, backward: du, the rows that the products begin with.
template <typename T, int kBlockM>
PETL_DEVICE void differentiate_sum(const NormRows& call, const BlockRows<T, kBlockM>& block, unsigned char* spare) {
  constexpr int kCount = kChunk<T>;
  const int d = call.in[0].cols;
  // g waits where du will be, if it has the dtype for it.
  const bool waits = call.adapter.made && call.in[0].dtype == DTypeOf<T>::value;
  const auto rows = [&](float (&g)[kCount], float (&xh)[kCount], int, int row, int col, bool first) {
    if (!first && waits) {
      block.get(g, row, col);
    } else {
      load_floats(g, call.in[0], block.row_0 + row, col);
      if (waits) block.put(g, row, col);
    }
    load_floats(xh, call.in[1], block.row_0 + row, col);
  };
  const bool wanted = call.adapter.d_from > 0 || call.out[0].data;
  differentiate_norm<T, kBlockM>(call, d, wanted, spare, rows, [&](auto& du, int row, int col) {
    if (call.out[0].data && block.row_0 + row < block.n) {
      store_floats(call.out[0], call.vectors[0], block.row_0 + row, col, d, du);
    }
    if (call.adapter.made) block.put(du, row, col);
  });
}

// Pre-norm, backward: dx from du = dz w_down, which the products leave.
template <typename T, int kBlockM>
PETL_DEVICE void differentiate_x(const NormRows& call, const BlockRows<T, kBlockM>& block, unsigned char* spare) {
  constexpr int kCount = kChunk<T>, kRows = kBlockM / kRowsAtOnce;
  const int d = call.adapter.d_to;
  float mean[kRows] = {}, rstd[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = row_of_thread<kBlockM>(i);
    if (row >= block.n) continue;
    if (call.mean.data) mean[i] = static_cast<const float*>(call.mean.data)[row];
    rstd[i] = static_cast<const float*>(call.rstd.data)[row];
  }
  const auto rows = [&](float (&du)[kCount], float (&xh)[kCount], int i, int row, int col, bool) {
    block.get(du, row, col);
    load_floats(xh, call.in[0], block.row_0 + row, col);
#pragma unroll
    for (int e = 0; e < kCount; ++e) xh[e] = (xh[e] - mean[i]) * rstd[i];
  };
  differentiate_norm<T, kBlockM>(call, d, call.out[0].data != nullptr, spare, rows, [&](auto& dx, int row, int col) {
    if (block.row_0 + row >= block.n) return;
    float g[kCount];
    load_floats(g, call.in[1], block.row_0 + row, col);
#pragma unroll
    for (int e = 0; e < kCount; ++e) dx[e] += g[e];
    store_floats(call.out[0], call.vectors[0], block.row_0 + row, col, d, dx);
  });
}

// Which of the two norms is asked at run time: the products between them are most of a kernel, and of its compilation.
template <typename T, int kRanks, int kBlockM, bool kBackward>
__global__ void __launch_bounds__(kThreads, kRanks > 64 ? 1 : 2) norm_rows_kernel(const __grid_constant__ NormRows call) {
  const int64_t row_0 = static_cast<int64_t>(blockIdx.x) * kBlockM;
  prefetch_rows(call.in[0], row_0, kBlockM);
  if (call.post) prefetch_rows(call.in[1], row_0, kBlockM);
  const auto before = [&](unsigned char* slabs, unsigned char* spare) {
    if (call.post != kBackward) return;
    const BlockRows<T, kBlockM> block{slabs, call.scratch, row_0, call.adapter.n};
    if constexpr (kBackward) {
      differentiate_sum(call, block, spare);
    } else {
      normalise_x(call, block);
    }
    sync_block();
  };
  const auto after = [&](unsigned char* slabs, unsigned char* spare) {
    if (call.post == kBackward) return;
    const BlockRows<T, kBlockM> block{slabs, call.scratch, row_0, call.adapter.n};
    sync_block();
    if constexpr (kBackward) {
      differentiate_x(call, block, spare);
    } else {
      normalise_sum(call, block);
    }
  };
  adapter_rows<T, kRanks, kBlockM, kBackward>(call.adapter, before, after);
}

}  // namespace petl::cuda
