// The channel adapter: y = x but in chosen columns, where y_C = a x_C + b (x_C w^T + bias), of a and b one being the scale.
// Forward and dx are one kernel: a block copies its rows, gathers their chosen columns into shared memory, multiplies them
// with the weight slab by slab and scatters the result over the copy. The parameters' gradients come from g_C^T x_C.
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "weight_gradient.h"

namespace petl::cuda {
namespace {

constexpr int kBlockRows = 32, kSlab = kBlockRows * kRowBytes;
constexpr int kWidest = 384;  // channels: of floats their rows, a slab of weights and the indices are 99 KiB

struct ChannelRows {
  int64_t n;
  int d, k;
  const int64_t* channels;
  Source from, weight;  // x or g; [k, k]
  Rows bias, scale, to, picked;  // y or dx; where the forward leaves x_C
  float alpha;
  bool scale_input, vectors, fast;
  int stages;  // slabs of weights in shared memory: two, or one where two do not fit
};

template <typename T>
int64_t shared_bytes(int64_t k, int stages) {
  return cdiv(k, kWidth<T>) * (kSlab + stages * kWidth<T> * kRowBytes) + k * 8;
}

template <typename T>
PETL_DEVICE void copy_rows(const ChannelRows& call, int64_t row_0) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_of_thread();
  for (int row = warp; row < kBlockRows && row_0 + row < call.n; row += kWarps) {
    const T* const from = static_cast<const T*>(call.from.data) + (row_0 + row) * call.from.stride;
    T* const to = static_cast<T*>(call.to.data) + (row_0 + row) * call.to.stride;
    const int whole = call.vectors ? call.d / kChunk<T> : 0;
    for (int c = lane; c < whole; c += kWarp) reinterpret_cast<Chunk<T>*>(to)[c] = reinterpret_cast<const Chunk<T>*>(from)[c];
    for (int c = whole * kChunk<T> + lane; c < call.d; c += kWarp) to[c] = from[c];
  }
}

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) channel_rows_kernel(const __grid_constant__ ChannelRows call) {
  constexpr int kAcross = 4, kSteps = kWidth<T> / kDeep<T>, kSubTile = kWidth<T> * kRowBytes;  // 2 x 4 warps
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_of_thread();
  const int down = warp / kAcross * 16, across = warp % kAcross * 16;
  const int64_t row_0 = static_cast<int64_t>(blockIdx.x) * kBlockRows;
  const int k = call.k, slabs = static_cast<int>(cdiv(k, kWidth<T>));
  unsigned char *const rows = shared_memory(), *const weights = rows + slabs * kSlab;
  int64_t* const channels = reinterpret_cast<int64_t*>(weights + call.stages * slabs * kSubTile);

  // Columns of the result slab by slab: rows of the weight in the forward, its columns in the backward.
  const auto load_weights = [&](int i) {
    unsigned char* const stage = weights + i % call.stages * slabs * kSubTile;
    if constexpr (kBackward) {
      load_tile<T>(stage, static_cast<int>(round_up(k, 16)), call.weight, 0, i * kWidth<T>);
    } else {
      for (int t = 0; t < slabs; ++t) {
        load_tile<T>(stage + t * kSubTile, kWidth<T>, call.weight, i * kWidth<T>, t * kWidth<T>);
      }
    }
  };
  if (slabs > 0) load_weights(0);
  copy_async_commit();
  for (int i = static_cast<int>(threadIdx.x); i < k; i += kThreads) channels[i] = call.channels[i];
  sync_block();
  for (int t = 0; t < slabs; ++t) {
    load_gathered<T>(rows + t * kSlab, kBlockRows, call.from, row_0, channels + t * kWidth<T>, k - t * kWidth<T>);
  }
  copy_rows<T>(call, row_0);

  const float s = call.alpha * (call.scale.data ? load_float(call.scale.data, call.scale.dtype, 0) : 1.0f);
  const float of_own = call.scale_input ? s : 1.0f, of_product = call.scale_input ? 1.0f : s;
  for (int i = 0; i < slabs; ++i) {
    if (call.stages == 1 && i > 0) {
      sync_block();
      load_weights(i);
      copy_async_commit();
    }
    copy_async_wait<0>();
    sync_block();  // at the first slab the copied and the gathered rows are there too
    if (call.stages > 1 && i + 1 < slabs) load_weights(i + 1);
    copy_async_commit();
    if (across >= kWidth<T>) continue;  // more warps than columns
    unsigned char* const stage = weights + i % call.stages * slabs * kSubTile;
    float acc[2][4] = {};
    for (int step = 0; step * kDeep<T> < k; ++step) {
      OperandA a;
      OperandB b;
      load_a<T>(a, rows + step / kSteps * kSlab, down, step % kSteps);
      if constexpr (kBackward) {
        load_b_transposed<T>(b, stage, across, step * kDeep<T>);
      } else {
        load_b<T>(b, stage + step / kSteps * kSubTile, across, step % kSteps);
      }
      multiply<T>(acc, a, b, call.fast);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int row = down + lane / 4 + e % 4 / 2 * 8, in_slab = across + e / 4 * 8 + lane % 4 * 2 + e % 2;
      const int col = i * kWidth<T> + in_slab;
      const int64_t n = row_0 + row;
      if (n >= call.n || col >= k) continue;
      const T own = *element_of<T>(rows + i * kSlab, row, in_slab);
      const float bias = call.bias.data ? load_float(call.bias.data, call.bias.dtype, col) : 0.0f;
      const float value = of_own * to_float(own) + of_product * (acc[e / 4][e % 4] + bias);
      static_cast<T*>(call.to.data)[n * call.to.stride + channels[col]] = from_float<T>(value);
      if (call.picked.data) static_cast<T*>(call.picked.data)[n * call.picked.stride + col] = own;
    }
  }
}

struct ChannelSums {
  int64_t groups, k;
  const float *m_parts, *g_parts;  // of g_C^T x_C and of the sums of g_C
  Source weight;
  Rows bias, scale, dweight, dbias, dscale;
  float alpha;
  bool scale_input;
};

// An element of dweight or dbias per thread; block 0 of the third row sums the scale's gradient, k^2 elements.
__global__ void __launch_bounds__(kThreads) channel_adapter_sums_kernel(const __grid_constant__ ChannelSums call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, k = call.k;
  const float s = call.alpha * (call.scale.data ? load_float(call.scale.data, call.scale.dtype, 0) : 1.0f);
  const float factor = call.scale_input ? 1.0f : s;
  if (blockIdx.y == 0) {
    if (!call.dweight.data || i >= k * k) return;
    return store_float(call.dweight.data, call.dweight.dtype, i, factor * sum_groups(call.m_parts, call.groups, k * k, i));
  }
  if (blockIdx.y == 1) {
    if (!call.dbias.data || i >= k) return;
    return store_float(call.dbias.data, call.dbias.dtype, i, factor * sum_groups(call.g_parts, call.groups, k, i));
  }
  if (!call.dscale.data || blockIdx.x > 0) return;
  float sum = 0;
  if (call.scale_input) {  // g_C . x_C, the trace
    for (int64_t j = threadIdx.x; j < k; j += kThreads) sum += sum_groups(call.m_parts, call.groups, k * k, j * k + j);
  } else {
    for (int64_t e = threadIdx.x; e < k * k; e += kThreads) {
      const float w = load_float(call.weight.data, call.weight.dtype, e / k * call.weight.stride + e % k);
      sum += w * sum_groups(call.m_parts, call.groups, k * k, e);
    }
    for (int64_t j = threadIdx.x; call.bias.data && j < k; j += kThreads) {
      sum += load_float(call.bias.data, call.bias.dtype, j) * sum_groups(call.g_parts, call.groups, k, j);
    }
  }
  float* const shares = reinterpret_cast<float*>(shared_memory());
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (threadIdx.x % kWarp == 0) shares[threadIdx.x / kWarp] = sum;
  sync_block();
  if (threadIdx.x > 0) return;
  float total = 0;
  for (int w = 0; w < kWarps; ++w) total += shares[w];
  store_float(call.dscale.data, call.dscale.dtype, 0, call.alpha * total);
}

template <bool kBackward>
void by_rows(ChannelRows rows, const Launch& launch) {
  if (rows.k > kWidest) throw std::invalid_argument("channel_adapter: more than 384 channels");
  with_type(rows.from.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    rows.stages = shared_bytes<T>(rows.k, 2) <= launch.shared_bytes ? 2 : 1;
    petl::cuda::launch(channel_rows_kernel<T, kBackward>, dim3(static_cast<unsigned>(cdiv(rows.n, kBlockRows))), kThreads,
                       shared_bytes<T>(rows.k, rows.stages), launch.stream, rows);
  });
}

struct Plan {
  bool m, g_sums;
  Groups groups;
  int64_t at_g, bytes;
};

Plan plan(const ChannelAdapterBackward& c, const Launch& launch) {
  Plan p{};
  p.m = c.dweight || c.dscale;
  p.g_sums = c.dbias || (c.dscale && c.bias);
  const int64_t side = cdiv(c.k, kGradientRanks), width = 256 / element_bytes(c.g.dtype);
  p.groups = groups_of(c.n, side * (p.m ? cdiv(c.k, width) : 1), 4 * std::max<int64_t>(c.k, 16), launch.processors);
  p.at_g = p.m ? round_up(p.groups.count * c.k * c.k * 4, 16) : 0;
  p.bytes = p.at_g + (p.g_sums ? p.groups.count * c.k * 4 : 0);
  return p;
}

}  // namespace

void channel_adapter_forward(const ChannelAdapterForward& c, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  const ChannelRows rows{c.n, static_cast<int>(c.d), static_cast<int>(c.k), c.channels, source(c.x, c.n, c.d),
                         source(c.weight, c.k, c.k), c.bias, c.scale, c.y, c.x_channels, static_cast<float>(c.alpha),
                         c.scale_input, on_16_bytes(c.x) && on_16_bytes(c.y), launch.fast, 0};
  by_rows<false>(rows, launch);
}

int64_t channel_adapter_workspace(const ChannelAdapterBackward& c, const Launch& launch) { return plan(c, launch).bytes; }

void channel_adapter_backward(const ChannelAdapterBackward& c, const Launch& launch, void* workspace) {
  const DeviceGuard guard(launch.device);
  if (c.dx) {
    const ChannelRows rows{c.n, static_cast<int>(c.d), static_cast<int>(c.k), c.channels, source(c.g, c.n, c.d),
                           source(c.weight, c.k, c.k), {}, c.scale, c.dx, {}, static_cast<float>(c.alpha),
                           c.scale_input, on_16_bytes(c.g) && on_16_bytes(c.dx), launch.fast, 0};
    by_rows<true>(rows, launch);
  }
  const Plan p = plan(c, launch);
  if (!p.m && !p.g_sums) return;
  float* const m = p.m ? static_cast<float*>(workspace) : nullptr;
  auto* const after = static_cast<unsigned char*>(workspace) + p.at_g;
  float* const g_sums = p.g_sums ? reinterpret_cast<float*>(after) : nullptr;
  TallProducts products{};
  products.n = c.n, products.group_rows = p.groups.rows, products.fast = launch.fast;
  products.count = 1, products.tiles = static_cast<int>(cdiv(c.k, kGradientRanks));
  const Source q = p.m ? source(c.x_channels, c.n, c.k) : source(c.g, c.n, 0);
  products.products[0] = {source(c.g, c.n, c.k), q, c.channels, m, g_sums, nullptr, c.k, 1};
  with_type(c.g.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const dim3 grid(static_cast<unsigned>(std::max<int64_t>(1, cdiv(q.cols, kGradientWidth<T>))),
                    static_cast<unsigned>(products.tiles), static_cast<unsigned>(p.groups.count));
    if (c.k > 0) {
      petl::cuda::launch(tall_products_kernel<T, true>, grid, kThreads, tall_shared_bytes<T>(), launch.stream, products);
    }
  });
  const ChannelSums sums{p.groups.count, c.k, m, g_sums, source(c.weight, c.k, c.k), c.bias, c.scale, c.dweight, c.dbias,
                         c.dscale, static_cast<float>(c.alpha), c.scale_input};
  const int64_t blocks = std::max<int64_t>(1, cdiv(c.dweight ? c.k * c.k : c.k, kThreads));
  petl::cuda::launch(channel_adapter_sums_kernel, dim3(static_cast<unsigned>(blocks), 3), kThreads, kWarps * 4,
                     launch.stream, sums);
}

}  // namespace petl::cuda
