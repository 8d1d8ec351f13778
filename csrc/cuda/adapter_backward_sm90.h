// The adapter's backward on sm_90a, in one launch. A cluster of blocks has all of d between its blocks, 128 columns of g, x and
// dx each, and takes tiles of 64 rows; g and x are read once and dx is written once. For every tile
//   - each block multiplies its columns, dh = g w_up, and leaves its partial sum in its shared memory;
//   - each block sums some of the rows over the blocks in their order, and sends dz and h of them to all;
//   - each block has dx = dz w_down (+ g) of its columns, and adds g^T h and x^T dz to sums that stay in registers.
// The cluster's barrier, twice a tile, also tells that a tile's place in the ring of three is free. The two warpgroups of a
// block have 64 columns each.
//
// The clusters' sums meet in a binary tree whose shape depends on nothing but their number: of two siblings the one that is
// later adds the other's sums to its own and goes on. Nobody waits, so that no two clusters need to run at the same time;
// addition commutes, so that every run gives the same bits; and what is left to do when the last tile is done are log2 of
// the clusters additions, where one that came last over all would read everything alone.
#pragma once

#include "activation.h"
#include "wgmma.h"

namespace petl::cuda {

struct AdapterBackward90 {
  TensorMap g, x, dx;
  int64_t n;
  int cluster, d_in, r, d_out;
  bool add_g, wants_x, wants_dx, wants_sums;
  Source w_down, w_up;
  Rows z, b_up, scale;
  int scale_size;
  float alpha;
  Activation activation;
  Rows dw_down, db_down, dw_up, db_up, dscale;
  Rows param_w_up;
  float* parts;     // per block kBackwardSums floats per thread
  unsigned* flags;  // per block and node of the tree: who came first, plus one; zero at the beginning
};

constexpr int kClusterCols = 128, kMostBlocks = 8, kRing = 3;
constexpr int kBackwardSums = 32 + 32 + 2 + 2 + 1;
constexpr int kPartialStride = 72;  // floats: 8 rows of a pair of columns lie in different banks
constexpr int kStageTiles = 4;      // g and x of two warpgroups
constexpr int64_t kBackwardBytes = (kRing * kStageTiles + 4 + 2) * kTileBytes + kTileRows * kPartialStride * 4 +
                                   (kMostBlocks + kWarps) * 4 + (kRing + 1) * 8;

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) adapter_backward_sm90_kernel(const __grid_constant__ AdapterBackward90 call) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int group = thread / kWarpgroup, member = thread % kWarpgroup;
  const int rank = cluster_rank(), blocks = call.cluster;
  const int cluster = static_cast<int>(blockIdx.x) / blocks, clusters = static_cast<int>(gridDim.x) / blocks;
  const int col_0 = rank * kClusterCols + group * kTileRows;  // of this warpgroup
  const int tiles = static_cast<int>(cdiv(call.n, kTileRows)), count = (tiles - cluster + clusters - 1) / clusters;
  const bool leads = member == 0;

  unsigned char* const ring = shared_memory_1024();
  unsigned char* const weights = ring + kRing * kStageTiles * kTileBytes;
  unsigned char *const w_up = weights + group * kTileBytes, *const w_down = weights + (2 + group) * kTileBytes;
  unsigned char *const dz_tile = weights + 4 * kTileBytes, *const h_tile = dz_tile + kTileBytes;
  auto* const partial = reinterpret_cast<float*>(h_tile + kTileBytes);
  float* const shares = partial + kTileRows * kPartialStride;  // of the blocks, then of the warps
  auto* const full = reinterpret_cast<uint64_t*>(shares + kMostBlocks + kWarps);
  auto* const first = reinterpret_cast<unsigned*>(full + kRing);

  const auto g_tile = [&](int k) { return ring + (k % kRing * kStageTiles + group) * kTileBytes; };
  const auto x_tile = [&](int k) { return g_tile(k) + 2 * kTileBytes; };
  const auto row_of = [&](int k) { return (cluster + static_cast<int64_t>(k) * clusters) * kTileRows; };
  const auto load = [&](int k) {
    if (k >= count) return;
    uint64_t* const barrier = full + k % kRing;
    barrier_arrive_expecting(barrier, call.wants_x ? 2 * kTileBytes : kTileBytes);
    load_box(g_tile(k), call.g, barrier, row_of(k), col_0);
    if (call.wants_x) load_box(x_tile(k), call.x, barrier, row_of(k), col_0);
  };
  if (thread == 0) {
    for (int i = 0; i < kRing; ++i) barrier_init(full + i, 2);
    barriers_ready();
  }
  sync_block();
  if (leads) load(0), load(1);
  const void* const factors = call.scale_size > 1 ? call.scale.data : nullptr;
  for (int i = 0; i < 2; ++i) {
    const int col = rank * kClusterCols + i * kTileRows;
    load_tile_scaled<T>(weights + i * kTileBytes, kTileRows, call.w_up, col, 0, factors, call.scale.dtype);
    load_tile<T>(weights + (2 + i) * kTileBytes, kTileRows, call.w_down, 0, col);
  }
  copy_async_commit();
  copy_async_wait<0>();
  fence_async();
  sync_block();

  const float s = call.alpha * (call.scale_size == 1 ? load_float(call.scale.data, call.scale.dtype, 0) : 1.0f);
  float up[32] = {}, down[32] = {}, g_sum[2] = {}, dz_sum[2] = {}, dscale = 0;  // up: rows are channels; down: columns of x
  for (int k = 0; k < count; ++k) {
    unsigned char *const g = g_tile(k), *const x = call.wants_x ? x_tile(k) : g;  // for what nobody wants, anything
    const int64_t row_0 = row_of(k);
    barrier_wait(full + k % kRing, k / kRing & 1);
    float dh[32];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) {
      wgmma<T, 0, 1>(dh, operand(g, step), operand_transposed(w_up, step), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    const auto each_pair = [&](auto&& f) {
#pragma unroll
      for (int e = 0; e < 32; e += 2) {
        f(reinterpret_cast<Pair*>(partial + sum_row(member, e) * kPartialStride + sum_col(member, e)), dh[e], dh[e + 1]);
      }
    };
    if (group == 0) each_pair([](Pair* at, float low, float high) { *at = {low, high}; });
    sync_block();
    if (group == 1) each_pair([](Pair* at, float low, float high) { *at = {at->x + low, at->y + high}; });
    cluster_arrive();
    cluster_wait();

    if (leads) {  // tile k - 1 is done with, but for its dx
      store_wait<0>();
      load(k + kRing - 1);
    }
    const int rows = (kTileRows + blocks - 1) / blocks, end = rank * rows + rows < kTileRows ? rank * rows + rows : kTileRows;
#pragma unroll 1
    for (int row = rank * rows + warp; row < end; row += kWarps) {
      const int col = 2 * lane;
      const bool inside = row_0 + row < call.n && col < call.r;
      const T* const z_at = static_cast<const T*>(call.z.data) + (row_0 + row) * call.z.stride + col;
      const uint32_t z_bits = inside ? *reinterpret_cast<const uint32_t*>(z_at) : 0;
      Pair parts[kMostBlocks];  // all are asked for before the first is added
#pragma unroll
      for (int b = 0; b < kMostBlocks; ++b) {
        parts[b] = b < blocks ? load_remote(partial + row * kPartialStride + col, b) : Pair{0, 0};
      }
      float sum[2] = {};
#pragma unroll
      for (int b = 0; b < kMostBlocks; ++b) sum[0] += parts[b].x, sum[1] += parts[b].y;
      uint32_t dz = 0, h = 0;  // zero outside: what is infinite elsewhere meets these
      if (inside) {
        const Pair z = unpack<T>(z_bits);
        const Activated low = activate(z.x, call.activation), high = activate(z.y, call.activation);
        dz = pack<T>(sum[0] * s * low.slope, sum[1] * s * high.slope), h = pack<T>(low.value, high.value);
        dscale += sum[0] * low.value + sum[1] * high.value;
      }
      for (int b = 0; b < blocks; ++b) {
        store_remote(element_of<T>(dz_tile, row, col), b, dz);
        store_remote(element_of<T>(h_tile, row, col), b, h);
      }
    }
    fence_async();
    cluster_arrive();
    cluster_wait();
    fence_async();  // the readers' too: what they read, threads of other blocks have stored

    float out[32];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) {
      wgmma<T, 0, 1>(out, operand(dz_tile, step), operand_transposed(w_down, step), step > 0);
      wgmma<T, 1, 1>(up, operand_transposed(g, step), operand_transposed(h_tile, step), true);
      wgmma<T, 1, 1>(down, operand_transposed(x, step), operand_transposed(dz_tile, step), true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (int row = member / kWarp * 16; row < member / kWarp * 16 + 16; ++row) {
      const Pair of_g = unpack<T>(*reinterpret_cast<const uint32_t*>(element_of<T>(g, row, 2 * lane)));
      const Pair of_dz = unpack<T>(*reinterpret_cast<const uint32_t*>(element_of<T>(dz_tile, row, 2 * lane)));
      g_sum[0] += of_g.x, g_sum[1] += of_g.y;
      dz_sum[0] += of_dz.x, dz_sum[1] += of_dz.y;
    }
    if (!call.wants_dx) continue;
    sync_warp();  // its rows of g are summed: dx takes their place
#pragma unroll
    for (int e = 0; e < 32; e += 2) {
      auto* const at = reinterpret_cast<uint32_t*>(element_of<T>(g, sum_row(member, e), sum_col(member, e)));
      const Pair add = call.add_g ? unpack<T>(*at) : Pair{0, 0};
      *at = pack<T>(out[e] + add.x, out[e + 1] + add.y);
    }
    fence_async();
    sync_threads(1 + group, kWarpgroup);
    if (leads) {
      store_box(call.dx, g, row_0, col_0);
      store_commit();
    }
  }
  if (leads) store_wait<0>();
  if (!call.wants_sums) return;

  // The scale's gradient of the whole cluster: sum h (g w_up) + sum b_up (sum g), in block 0.
  if (call.dscale.data && call.scale_size == 1) {
    for (int i = 0; i < 2; ++i) {
      const int channel = col_0 + 2 * lane + i;
      if (call.b_up.data && channel < call.d_out) dscale += load_float(call.b_up.data, call.b_up.dtype, channel) * g_sum[i];
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) dscale += shuffle_xor(dscale, mask);
    float* const of_warps = shares + kMostBlocks;
    if (lane == 0) of_warps[warp] = dscale;
    sync_block();
    dscale = 0;
    if (thread == 0) {
      float sum = 0;
      for (int i = 0; i < kWarps; ++i) sum += of_warps[i];
      store_remote(shares + rank, 0, float_to_bits(sum));
    }
    cluster_arrive();
    cluster_wait();
    if (rank == 0 && thread == 0) {
      for (int b = 0; b < blocks; ++b) dscale += shares[b];
    }
  }

  const auto each_sum = [&](auto&& f) {
#pragma unroll
    for (int e = 0; e < 32; ++e) f(e, up[e]), f(32 + e, down[e]);
#pragma unroll
    for (int i = 0; i < 2; ++i) f(64 + i, g_sum[i]), f(66 + i, dz_sum[i]);
    f(68, dscale);
  };
  const auto part_of = [&](int of) {
    return call.parts + (static_cast<int64_t>(of) * blocks + rank) * kBackwardSums * kThreads + thread;
  };
  unsigned* flags = call.flags + rank;
  for (int node = cluster, nodes = clusters; nodes > 1; node /= 2, nodes = (nodes + 1) / 2) {
    if ((node ^ 1) < nodes) {
      float* const own = part_of(cluster);
      each_sum([&](int e, float value) { own[e * kThreads] = value; });
      fence_global();
      sync_block();
      if (thread == 0) *first = exchange(flags + node / 2 * blocks, static_cast<unsigned>(cluster) + 1);
      sync_block();
      const unsigned other = *first;
      if (other == 0) return;
      fence_global();
      const float* const theirs = part_of(static_cast<int>(other) - 1);
      each_sum([&](int e, float& value) { value += theirs[e * kThreads]; });
    }
    flags += (nodes + 1) / 2 * blocks;
  }

  // What is left has the sums of all rows. First those of columns, over the warps of each warpgroup.
  float *const columns = partial, *const ranks = columns + kWarps * kTileRows;
  for (int i = 0; i < 2; ++i) {
    columns[warp * kTileRows + 2 * lane + i] = g_sum[i];
    ranks[warp * kTileRows + 2 * lane + i] = dz_sum[i];
  }
  sync_block();
  const auto over_warps = [&](const float* of, int col) {
    float sum = 0;
    for (int w = 4 * group; w < 4 * group + 4; ++w) sum += of[w * kTileRows + col];
    return sum;
  };
  const auto scaled = [&](int channel) {
    if (call.scale_size == 0) return call.alpha;
    return call.alpha * load_float(call.scale.data, call.scale.dtype, call.scale_size == 1 ? 0 : channel);
  };
  const int col = col_0 + member;
  if (member < kTileRows && col < call.d_out && call.db_up.data) {
    store_float(call.db_up.data, call.db_up.dtype, col, over_warps(columns, member) * scaled(col));
  }
  if (col < call.r && rank == 0 && group == 0 && call.db_down.data) {
    store_float(call.db_down.data, call.db_down.dtype, member, over_warps(ranks, member));
  }
  if (rank == 0 && thread == 0 && call.dscale.data && call.scale_size == 1) {
    store_float(call.dscale.data, call.dscale.dtype, 0, call.alpha * dscale);
  }
  float of_channel[2] = {};  // w_up[c] . M[c], of this thread's two channels
#pragma unroll
  for (int e = 0; e < 32; ++e) {
    const int row = sum_row(member, e), k = sum_col(member, e), channel = col_0 + row;
    if (k >= call.r) continue;
    if (channel < call.d_out) {
      const int64_t at = static_cast<int64_t>(channel) * call.r + k;
      if (call.dw_up.data) store_float(call.dw_up.data, call.dw_up.dtype, at, up[e] * scaled(channel));
      if (factors && call.dscale.data) {
        const int64_t of_w = channel * call.param_w_up.stride + k;
        of_channel[e / 2 % 2] += up[e] * load_float(call.param_w_up.data, call.param_w_up.dtype, of_w);
      }
    }
    if (channel < call.d_in && call.dw_down.data) {
      store_float(call.dw_down.data, call.dw_down.dtype, static_cast<int64_t>(k) * call.d_in + channel, down[e]);
    }
  }
  if (!factors || !call.dscale.data) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = of_channel[half];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int row = sum_row(member, 2 * half), channel = col_0 + row;
    if (lane % 4 != 0 || channel >= call.d_out) continue;
    if (call.b_up.data) sum += load_float(call.b_up.data, call.b_up.dtype, channel) * over_warps(columns, row);
    store_float(call.dscale.data, call.dscale.dtype, channel, call.alpha * sum);
  }
}

}  // namespace petl::cuda
