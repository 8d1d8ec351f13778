// What the launches of an adapter have in common: the calls of its kernel by rows, and the gradients of its parameters
// behind it, which are two launches more, partial sums by groups of rows and their ordered sum.
#pragma once

#include <algorithm>

#include "adapter_rows.h"
#include "kernels.h"
#include "weight_gradient.h"

namespace petl::cuda {

// 64 rows a block where that fills the device: weights are read once per block, from L2. At d = 768 in 16 bits a block
// reads 192 KiB of them and moves 192 KiB of rows.
inline bool tall_blocks(int64_t n, const Launch& launch) { return n >= 64 * static_cast<int64_t>(launch.processors); }

// --- the ordered sum -------------------------------------------------------------------------------------------------

// The gradients of a norm's weight and bias, as a block of rows leaves them: two rows of `d` floats.
struct NormSums {
  const float* parts;
  int64_t d;
  Rows dweight, dbias;
};

// Partial sums, and what becomes of them.
struct Sums {
  int64_t groups, row_blocks, d_in, r, d_out;
  const float *w_down, *w_up, *b_down, *b_up, *scale;  // scale: of a scalar, a float per block of rows
  Rows dw_down, dw_up, db_down, db_up, dscale;
  Rows param_w_up, param_b_up, param_scale;
  int scale_size;
  float alpha;
  NormSums norm;
};

// There are many blocks of rows and few channels: a block sums 32 channels, each warp an eighth of the parts.
PETL_DEVICE void sum_norm(const NormSums& norm, int64_t row_blocks, int which, const Rows& gradient) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_of_thread();
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  if (!gradient.data || static_cast<int64_t>(blockIdx.x) * kWarp >= norm.d) return;
  float* const sums = reinterpret_cast<float*>(shared_memory());
  float sum = 0;
  for (int64_t b = warp; b < row_blocks && channel < norm.d; b += kWarps) sum += norm.parts[(2 * b + which) * norm.d + channel];
  sums[threadIdx.x] = sum;
  sync_block();
  if (warp > 0 || channel >= norm.d) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarp + lane];
  store_float(gradient.data, gradient.dtype, channel, sum);
}

// One gradient per blockIdx.y. Those of one size have a thread per element, that of the scale a warp per channel.
static __global__ void __launch_bounds__(kThreads) adapter_sums_kernel(const __grid_constant__ Sums call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const auto scaled = [&](int64_t c) {
    if (call.scale_size == 0) return call.alpha;
    return call.alpha * load_float(call.param_scale.data, call.param_scale.dtype, call.scale_size == 1 ? 0 : c);
  };
  const auto store = [&](const Rows& gradient, const float* parts, int64_t size, int64_t channel_elements) {
    if (!gradient.data || i >= size) return;
    const float sum = sum_groups(parts, call.groups, size, i);
    store_float(gradient.data, gradient.dtype, i, channel_elements ? sum * scaled(i / channel_elements) : sum);
  };
  if (blockIdx.y == 0) return store(call.dw_down, call.w_down, call.r * call.d_in, 0);
  if (blockIdx.y == 1) return store(call.dw_up, call.w_up, call.d_out * call.r, call.r);
  if (blockIdx.y == 2) return store(call.db_down, call.b_down, call.r, 0);
  if (blockIdx.y == 3) return store(call.db_up, call.b_up, call.d_out, 1);
  if (blockIdx.y == 5) return sum_norm(call.norm, call.row_blocks, 0, call.norm.dweight);
  if (blockIdx.y == 6) return sum_norm(call.norm, call.row_blocks, 1, call.norm.dbias);
  if (!call.dscale.data) return;

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto of_bias = [&](int64_t c) {
    if (!call.param_b_up.data) return 0.0f;
    return load_float(call.param_b_up.data, call.param_b_up.dtype, c) * sum_groups(call.b_up, call.groups, call.d_out, c);
  };
  if (call.scale_size > 1) {  // w_up[c] . M[c] + b_up[c] sum g[:, c]
    const int64_t c = i / kWarp;
    if (c >= call.d_out) return;
    float sum = lane == 0 ? of_bias(c) : 0.0f;
    for (int64_t k = lane; k < call.r; k += kWarp) {
      const float w = load_float(call.param_w_up.data, call.param_w_up.dtype, c * call.param_w_up.stride + k);
      sum += w * sum_groups(call.w_up, call.groups, call.d_out * call.r, c * call.r + k);
    }
    sum = sum_warp(sum);
    if (lane == 0) store_float(call.dscale.data, call.dscale.dtype, c, call.alpha * sum);
  } else if (i < kWarp) {
    float sum = 0;
    for (int64_t b = lane; b < call.row_blocks; b += kWarp) sum += call.scale[b];
    for (int64_t c = lane; c < call.d_out; c += kWarp) sum += of_bias(c);
    sum = sum_warp(sum);
    if (lane == 0) store_float(call.dscale.data, call.dscale.dtype, 0, call.alpha * sum);
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

// What a backward computes, in how many groups, and where in the workspace it keeps what.
struct GradientPlan {
  bool channel_scale, dscale, down, up, sums_g, first, h, tall;
  int64_t groups, group_rows, r_stride;
  int64_t at_dz, at_h, at_w_down, at_w_up, at_b_down, at_b_up, at_scale, bytes;
};

inline GradientPlan plan_gradients(const BottleneckBackward& c, const Launch& launch) {
  GradientPlan p{};
  const bool scale = static_cast<bool>(c.dscale);
  p.channel_scale = scale && c.scale_size > 1;
  p.dscale = scale && c.scale_size == 1;
  p.down = static_cast<bool>(c.dw_down) || static_cast<bool>(c.db_down);
  p.sums_g = static_cast<bool>(c.db_up) || (scale && c.b_up);
  p.h = static_cast<bool>(c.dw_up) || p.channel_scale;
  p.up = p.h || p.sums_g;
  p.first = static_cast<bool>(c.dx) || p.down || p.dscale || c.dgate;
  p.tall = tall_blocks(c.n, launch);

  const int64_t element = element_bytes(c.z.dtype), width = 256 / element;
  const int64_t ranks = cdiv(c.r, kGradientRanks);
  const int64_t tiles = ranks * ((p.down ? cdiv(c.d_in, width) : 0) + (p.up ? cdiv(c.d_out, width) : 0));
  const Groups groups = groups_of(c.n, tiles, 4 * std::max<int64_t>(c.r, 16), launch.processors);
  p.groups = groups.count, p.group_rows = groups.rows;

  p.r_stride = round_up(c.r, 16 / element);  // rows on 16 bytes
  const auto take = [&](bool needed, int64_t bytes) {
    const int64_t at = p.bytes;
    if (needed) p.bytes += round_up(bytes, 16);
    return at;
  };
  p.at_dz = take(p.down, c.n * p.r_stride * element);
  p.at_h = take(p.h, c.n * p.r_stride * element);
  p.at_w_down = take(static_cast<bool>(c.dw_down), p.groups * c.r * c.d_in * 4);
  p.at_w_up = take(p.h, p.groups * c.r * c.d_out * 4);
  p.at_b_down = take(static_cast<bool>(c.db_down), p.groups * c.r * 4);
  p.at_b_up = take(p.sums_g, p.groups * c.d_out * 4);
  p.at_scale = take(p.dscale, cdiv(c.n, 32) * 4);
  return p;
}

inline AdapterRows forward_rows(const BottleneckForward& c, const Launch& launch) {
  AdapterRows rows{};
  rows.n = c.n, rows.d_from = static_cast<int>(c.d_in), rows.r = static_cast<int>(c.r), rows.d_to = static_cast<int>(c.d_out);
  rows.from = source(c.x, c.n, c.d_in), rows.w_down = source(c.w_down, c.r, c.d_in);
  rows.w_up = source(c.w_up, c.d_out, c.r), rows.residual = source(c.residual, c.n, c.d_out);
  rows.b_down = c.b_down, rows.b_up = c.b_up, rows.scale = c.scale;
  rows.scale_size = static_cast<int>(c.scale_size), rows.alpha = static_cast<float>(c.alpha);
  rows.activation = c.activation, rows.dropout = keep(c.dropout), rows.gate = c.gate;
  rows.vectors = on_16_bytes(c.y), rows.to = c.y, rows.z = c.z, rows.fast = launch.fast;
  return rows;
}

// Where in the workspace a backward keeps what; of a null one, when only its size is asked for, nothing is read.
inline unsigned char* at_byte(void* workspace, int64_t bytes) {
  return reinterpret_cast<unsigned char*>(reinterpret_cast<uintptr_t>(workspace) + static_cast<uintptr_t>(bytes));
}
struct Kept {
  Rows dz, h;
  float *w_down, *w_up, *b_down, *b_up, *scale;
};
inline Kept kept(const BottleneckBackward& c, const GradientPlan& p, void* workspace) {
  const auto at = [&](int64_t bytes) { return at_byte(workspace, bytes); };
  const auto floats = [&](bool needed, int64_t bytes) { return needed ? reinterpret_cast<float*>(at(bytes)) : nullptr; };
  return {p.down ? Rows{at(p.at_dz), c.z.dtype, p.r_stride} : Rows{}, p.h ? Rows{at(p.at_h), c.z.dtype, p.r_stride} : Rows{},
          floats(static_cast<bool>(c.dw_down), p.at_w_down), floats(p.h, p.at_w_up),
          floats(static_cast<bool>(c.db_down), p.at_b_down), floats(p.sums_g, p.at_b_up), floats(p.dscale, p.at_scale)};
}

inline AdapterRows backward_rows(const BottleneckBackward& c, const GradientPlan& p, const Launch& launch, void* workspace) {
  const Kept to = kept(c, p, workspace);
  AdapterRows rows{};
  rows.n = c.n, rows.d_from = p.first ? static_cast<int>(c.d_out) : 0, rows.r = static_cast<int>(c.r);
  rows.d_to = c.dx ? static_cast<int>(c.d_in) : 0;
  rows.from = source(c.g, c.n, c.d_out), rows.w_down = source(c.w_down, c.r, c.d_in);
  rows.w_up = source(c.w_up, c.d_out, c.r), rows.residual = source(c.add_g ? c.g : Rows{}, c.n, c.d_in);
  rows.b_up = c.b_up, rows.scale = c.scale;
  rows.scale_size = static_cast<int>(c.scale_size), rows.alpha = static_cast<float>(c.alpha);
  rows.activation = c.activation, rows.dropout = keep(c.dropout), rows.gate = c.gate;
  rows.vectors = on_16_bytes(c.dx), rows.to = c.dx, rows.z = c.z, rows.dz = to.dz, rows.h = to.h;
  rows.dscale = to.scale, rows.dgate = c.dgate, rows.fast = launch.fast;
  return rows;
}

// What follows the launch by rows. kNormal: dw_down is of the rows of x normalised, as `normal` says.
template <typename T, bool kNormal>
void launch_gradients(const BottleneckBackward& c, const GradientPlan& p, const Launch& launch, void* workspace,
                      int64_t row_blocks, const Normal& normal, const NormSums& norm) {
  const Kept from = kept(c, p, workspace);
  TallProducts products{};
  products.n = c.n, products.group_rows = p.group_rows, products.fast = launch.fast;
  products.tiles = static_cast<int>(cdiv(c.r, kGradientRanks));
  int64_t widest = 0;
  if (p.down) {
    // Without dw_down the sums of dz alone are wanted: dz serves as the other operand, of which nothing is kept.
    const Source x = c.dw_down ? source(c.x, c.n, c.d_in) : source(from.dz, c.n, 0);
    products.products[products.count++] = {source(from.dz, c.n, c.r), x, nullptr, from.w_down, from.b_down, nullptr, c.d_in, 1,
                                           {}, c.dw_down ? normal : Normal{}};
    widest = c.d_in;
  }
  if (p.up) {
    // Of sums of g alone the other operand has no columns.
    const Source other = p.h ? source(from.h, c.n, c.r) : source(c.g, c.n, 0);
    products.products[products.count++] = {other, source(c.g, c.n, c.d_out), nullptr, from.w_up, nullptr, from.b_up, 1, c.r,
                                           c.gate};
    widest = std::max(widest, c.d_out);
  }
  if (products.count > 0) {
    const dim3 grid(static_cast<unsigned>(cdiv(widest, kGradientWidth<T>)),
                    static_cast<unsigned>(products.count * products.tiles), static_cast<unsigned>(p.groups));
    petl::cuda::launch(tall_products_kernel<T, false, kNormal>, grid, kThreads, tall_shared_bytes<T>(), launch.stream, products);
  }
  if (products.count == 0 && !p.dscale && !norm.parts) return;
  const Sums sums{p.groups, row_blocks, c.d_in, c.r, c.d_out, from.w_down, from.w_up, from.b_down, from.b_up, from.scale,
                  c.dw_down, c.dw_up, c.db_down, c.db_up, c.dscale, c.w_up, c.b_up, c.scale,
                  static_cast<int>(c.scale_size), static_cast<float>(c.alpha), norm};
  const int64_t longest = std::max({c.dw_down ? c.r * c.d_in : 0, c.dw_up ? c.d_out * c.r : 0, c.r, c.d_out,
                                    p.channel_scale ? kWarp * c.d_out : 0, norm.parts ? kWarps * norm.d : 0});
  petl::cuda::launch(adapter_sums_kernel, dim3(static_cast<unsigned>(cdiv(longest, kThreads)), norm.parts ? 7 : 5), kThreads,
                     norm.parts ? kThreads * 4 : 0, launch.stream, sums);
}

}  // namespace petl::cuda
