// The adapter's forward on sm_90a: y = residual + s (h w_up^T + b_up), h = act(x w_down^T + b_down), for 64 rows a block.
// One thread keeps TMA busy: it asks for all of x at once (96 KiB at d = 768, which no bandwidth leaves waiting) and sends the
// weights through a ring of stages; a warpgroup multiplies. z never leaves the registers in which h becomes the operand of
// the second product. x stays in its tiles and y takes its place there; another residual is fetched to the same tiles once
// x has been read. Two blocks fit a processor up to d = 768, so that one loads while the other multiplies and stores.
#pragma once

#include "activation.h"
#include "wgmma.h"

namespace petl::cuda {

enum class Residual { kNone, kX, kOther };

struct AdapterForward90 {
  TensorMap x, w_down, w_up, residual, y;
  int64_t n;
  int d_in, r, d_out, stages;
  Residual added;
  Rows b_down, b_up, scale, z;
  int scale_size;
  float alpha;
  Activation activation;
};

constexpr int kForwardThreads = kWarpgroup + kWarp;  // the last warp loads

inline int64_t forward_tiles(int64_t d_in, int64_t d_out) { return cdiv(d_in > d_out ? d_in : d_out, kTileRows); }
inline int64_t forward_shared_bytes(int64_t tiles, int64_t stages) {
  return (tiles + stages) * kTileBytes + (tiles + 2 * stages + 1) * 8;
}

template <typename T>
__global__ void __launch_bounds__(kForwardThreads, 2) adapter_forward_sm90_kernel(const __grid_constant__ AdapterForward90 call) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int slabs = static_cast<int>(cdiv(call.d_in, kTileRows)), out_slabs = static_cast<int>(cdiv(call.d_out, kTileRows));
  const int tiles = slabs > out_slabs ? slabs : out_slabs, stages = call.stages;
  const int64_t row_0 = static_cast<int64_t>(blockIdx.x) * kTileRows;

  unsigned char* const rows = shared_memory_1024();
  unsigned char* const weights = rows + tiles * kTileBytes;
  auto* const rows_full = reinterpret_cast<uint64_t*>(weights + stages * kTileBytes);  // per tile
  uint64_t *const weights_full = rows_full + tiles, *const weights_free = weights_full + stages;
  uint64_t* const x_read = weights_free + stages;
  if (thread == 0) {
    for (int i = 0; i < tiles; ++i) barrier_init(rows_full + i, 1);
    for (int i = 0; i < stages; ++i) {
      barrier_init(weights_full + i, 1);
      barrier_init(weights_free + i, kWarpgroup / kWarp);
    }
    barrier_init(x_read, kWarpgroup / kWarp);
    barriers_ready();
  }
  sync_block();

  if (thread >= kWarpgroup) {
    if (lane != 0) return;
    const auto load_rows = [&](const TensorMap& map, int i) {
      barrier_arrive_expecting(rows_full + i, kTileBytes);
      load_box(rows + i * kTileBytes, map, rows_full + i, row_0, i * kTileRows);
    };
    const auto load_weights = [&](int i) {  // the slabs of both products are one sequence
      const int stage = i % stages;
      if (i >= stages) barrier_wait(weights_free + stage, (i / stages - 1) & 1);
      barrier_arrive_expecting(weights_full + stage, kTileBytes);
      const bool first = i < slabs;
      const int row = first ? 0 : (i - slabs) * kTileRows, col = first ? i * kTileRows : 0;
      load_box(weights + stage * kTileBytes, first ? call.w_down : call.w_up, weights_full + stage, row, col);
    };
    for (int i = 0; i < slabs; ++i) {
      load_rows(call.x, i);
      if (i < stages) load_weights(i);
    }
    for (int i = stages < slabs ? stages : slabs; i < slabs + out_slabs; ++i) {
      if (i == slabs && call.added == Residual::kOther) {
        barrier_wait(x_read, 0);
        for (int j = 0; j < out_slabs; ++j) load_rows(call.residual, j);
      }
      load_weights(i);
    }
    return;
  }

  const auto release = [&](int i) {
    if (lane == 0) barrier_arrive(weights_free + i % stages);
  };

  // z, a slab behind the tensor cores.
  float sums[32];
  for (int i = 0; i < slabs; ++i) {
    barrier_wait(rows_full + i, 0);
    barrier_wait(weights_full + i % stages, i / stages & 1);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileSteps; ++k) {
      wgmma<T, 0, 0>(sums, operand(rows + i * kTileBytes, k), operand(weights + i % stages * kTileBytes, k), i > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0) release(i - 1);
  }
  wgmma_wait<0>();
  release(slabs - 1);
  if (call.added == Residual::kOther && lane == 0) barrier_arrive(x_read);

  // h, as the second product takes it. The sums move past four registers, so that the code of the eight activations is there
  // four times and not 32.
  uint32_t h[kTileSteps][4];
#pragma unroll 1
  for (int j = 0; j < 8; ++j) {
    float value[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int rank = sum_col(thread, 4 * j + e);
      float z = sums[e];
      if (call.b_down.data && rank < call.r) z += load_float(call.b_down.data, call.b_down.dtype, rank);
      value[e] = to_float(from_float<T>(z));  // as eager rounds it
    }
    const int rank = sum_col(thread, 4 * j);  // r is even: a pair is inside or outside
    uint32_t pair[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float low = value[2 * half], high = value[2 * half + 1];
      const int64_t n = row_0 + sum_row(thread, 2 * half);
      if (call.z.data && n < call.n && rank < call.r) {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(call.z.data) + n * call.z.stride + rank) = pack<T>(low, high);
      }
      // Zero must come out beside the weights: an infinite x times the zeros there is NaN.
      const uint32_t both = pack<T>(activate(low, call.activation).value, activate(high, call.activation).value);
      pair[half] = rank < call.r ? both : 0;
    }
#pragma unroll
    for (int i = 0; i < 28; ++i) sums[i] = sums[i + 4];
#pragma unroll
    for (int i = 0; i < 14; ++i) h[i / 4][i % 4] = h[(i + 2) / 4][(i + 2) % 4];
    h[3][2] = pair[0], h[3][3] = pair[1];
  }

  // y, slab by slab. (In sums of their own: with the others' ptxas finds no registers to overlap products in.)
  const float s = call.alpha * (call.scale_size == 1 ? load_float(call.scale.data, call.scale.dtype, 0) : 1.0f);
  for (int j = 0; j < out_slabs; ++j) {
    const int i = slabs + j;
    unsigned char* const tile = rows + j * kTileBytes;
    float out[32];
    barrier_wait(weights_full + i % stages, i / stages & 1);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileSteps; ++k) {
      wgmma_registers<T>(out, h[k], operand(weights + i % stages * kTileBytes, k), k > 0);
    }
    wgmma_commit();
    if (call.added == Residual::kOther) barrier_wait(rows_full + j, j < slabs ? 1 : 0);
    wgmma_wait<0>();
    release(i);
#pragma unroll
    for (int e = 0; e < 32; e += 4) {
      const int col = sum_col(thread, e), channel = j * kTileRows + col;
      float bias[2] = {}, factor[2] = {s, s};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (channel + c >= call.d_out) continue;
        if (call.b_up.data) bias[c] = load_float(call.b_up.data, call.b_up.dtype, channel + c);
        if (call.scale_size > 1) factor[c] = call.alpha * load_float(call.scale.data, call.scale.dtype, channel + c);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto* const at = reinterpret_cast<uint32_t*>(element_of<T>(tile, sum_row(thread, 2 * half), col));
        const Pair add = call.added == Residual::kNone ? Pair{0, 0} : unpack<T>(*at);
        *at = pack<T>(add.x + (out[e + 2 * half] + bias[0]) * factor[0], add.y + (out[e + 2 * half + 1] + bias[1]) * factor[1]);
      }
    }
    fence_async();
    sync_threads(1, kWarpgroup);
    if (thread == 0) {
      store_box(call.y, tile, row_0, j * kTileRows);
      store_commit();
    }
  }
  if (thread == 0) store_wait<0>();  // shared memory must outlive its readers
}

}  // namespace petl::cuda
