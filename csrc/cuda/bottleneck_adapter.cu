// The bottleneck adapter. Forward: one launch. Backward: dz and dx by rows, the partial gradients of the weights by groups
// of rows, and the sum over the groups.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "adapter_rows.h"
#include "kernels.h"
#include "weight_gradient.h"

namespace petl::cuda {
namespace {

// --- by rows ---------------------------------------------------------------------------------------------------------

template <typename T, int kRanks, int kBlockM, bool kBackward>
void launch_rows(const AdapterRows& rows, const Launch& launch, int64_t shared_bytes) {
  petl::cuda::launch(adapter_rows_kernel<T, kRanks, kBlockM, kBackward>, dim3(static_cast<unsigned>(cdiv(rows.n, kBlockM))),
                     kThreads, shared_bytes, launch.stream, rows);
}

// 64 rows a block where that fills the device: weights are read once per block, from L2. At d = 768 in 16 bits a block
// reads 192 KiB of them and moves 192 KiB of rows.
bool tall_blocks(int64_t n, const Launch& launch) { return n >= 64 * static_cast<int64_t>(launch.processors); }

// The first of these that fits a block's shared memory: as wanted, not resident, 32 rows, both. Returns the blocks.
template <typename T, bool kBackward, int kRanks>
int64_t plan_rows(AdapterRows rows, const Launch& launch, bool resident, bool tall) {
  for (const bool tall_block : {true, false}) {
    for (const bool stays : {true, false}) {
      if ((tall_block && !tall) || (stays && !resident)) continue;
      const int64_t bytes = adapter_shared_bytes<T>(tall_block ? 64 : 32, kStages<kRanks>, rows.d_from, rows.r, stays);
      if (bytes > launch.shared_bytes) continue;
      rows.resident = stays;
      if (tall_block) {
        launch_rows<T, kRanks, 64, kBackward>(rows, launch, bytes);
      } else {
        launch_rows<T, kRanks, 32, kBackward>(rows, launch, bytes);
      }
      return cdiv(rows.n, tall_block ? 64 : 32);
    }
  }
  throw std::invalid_argument("bottleneck_adapter: the bottleneck is too wide for the shared memory of this device");
}

template <typename T, bool kBackward>
int64_t by_rows(const AdapterRows& rows, const Launch& launch, bool resident, bool tall) {
  if (rows.r > 256) throw std::invalid_argument("bottleneck_adapter: the bottleneck is wider than 256");
  if (rows.r <= 64) return plan_rows<T, kBackward, 64>(rows, launch, resident, tall);
  return plan_rows<T, kBackward, 256>(rows, launch, resident, tall);
}

// --- the gradients of the parameters -----------------------------------------------------------------------------------

// Partial sums, and what becomes of them.
struct Sums {
  int64_t groups, row_blocks, d_in, r, d_out;
  const float *w_down, *w_up, *b_down, *b_up, *scale;  // scale: of a scalar, a float per block of rows
  Rows dw_down, dw_up, db_down, db_up, dscale;
  Rows param_w_up, param_b_up, param_scale;
  int scale_size;
  float alpha;
};

// One gradient per blockIdx.y. Those of one size have a thread per element, that of the scale a warp per channel.
__global__ void __launch_bounds__(kThreads) adapter_sums_kernel(const __grid_constant__ Sums call) {
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

// What a backward computes, in how many groups, and where in the workspace it keeps what.
struct Plan {
  bool channel_scale, dscale, down, up, sums_g, first, h, tall;
  int64_t groups, group_rows, r_stride;
  int64_t at_dz, at_h, at_w_down, at_w_up, at_b_down, at_b_up, at_scale, bytes;
};

Plan plan(const BottleneckBackward& c, const Launch& launch) {
  Plan p{};
  const bool scale = static_cast<bool>(c.dscale);
  p.channel_scale = scale && c.scale_size > 1;
  p.dscale = scale && c.scale_size == 1;
  p.down = static_cast<bool>(c.dw_down) || static_cast<bool>(c.db_down);
  p.sums_g = static_cast<bool>(c.db_up) || (scale && c.b_up);
  p.h = static_cast<bool>(c.dw_up) || p.channel_scale;
  p.up = p.h || p.sums_g;
  p.first = static_cast<bool>(c.dx) || p.down || p.dscale || c.dgate;
  p.tall = tall_blocks(c.n, launch);

  const int64_t element = element_bytes(c.g.dtype), width = 256 / element;
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

}  // namespace

void bottleneck_forward(const BottleneckForward& c, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  AdapterRows rows{};
  rows.n = c.n, rows.d_from = static_cast<int>(c.d_in), rows.r = static_cast<int>(c.r), rows.d_to = static_cast<int>(c.d_out);
  rows.from = source(c.x, c.n, c.d_in), rows.w_down = source(c.w_down, c.r, c.d_in);
  rows.w_up = source(c.w_up, c.d_out, c.r), rows.residual = source(c.residual, c.n, c.d_out);
  rows.b_down = c.b_down, rows.b_up = c.b_up, rows.scale = c.scale;
  rows.scale_size = static_cast<int>(c.scale_size), rows.alpha = static_cast<float>(c.alpha);
  rows.activation = c.activation, rows.dropout = keep(c.dropout), rows.gate = c.gate;
  rows.vectors = on_16_bytes(c.y), rows.to = c.y, rows.z = c.z, rows.fast = launch.fast;
  const bool resident = c.residual && c.residual.data == c.x.data && c.residual.stride == c.x.stride && c.d_in == c.d_out;
  with_type(c.x.dtype, [&](auto* tag) {
    by_rows<std::remove_pointer_t<decltype(tag)>, false>(rows, launch, resident, tall_blocks(c.n, launch));
  });
}

int64_t bottleneck_workspace(const BottleneckBackward& call, const Launch& launch) { return plan(call, launch).bytes; }

void bottleneck_backward(const BottleneckBackward& c, const Launch& launch, void* workspace) {
  const DeviceGuard guard(launch.device);
  const Plan p = plan(c, launch);
  const auto at = [&](int64_t bytes) { return static_cast<unsigned char*>(workspace) + bytes; };
  const auto floats = [&](bool needed, int64_t bytes) { return needed ? reinterpret_cast<float*>(at(bytes)) : nullptr; };
  const Rows dz = p.down ? Rows{at(p.at_dz), c.g.dtype, p.r_stride} : Rows{};
  const Rows h = p.h ? Rows{at(p.at_h), c.g.dtype, p.r_stride} : Rows{};
  float* const scale_parts = floats(p.dscale, p.at_scale);

  AdapterRows rows{};
  rows.n = c.n, rows.d_from = p.first ? static_cast<int>(c.d_out) : 0, rows.r = static_cast<int>(c.r);
  rows.d_to = c.dx ? static_cast<int>(c.d_in) : 0;
  rows.from = source(c.g, c.n, c.d_out), rows.w_down = source(c.w_down, c.r, c.d_in);
  rows.w_up = source(c.w_up, c.d_out, c.r), rows.residual = source(c.add_g ? c.g : Rows{}, c.n, c.d_in);
  rows.b_up = c.b_up, rows.scale = c.scale;
  rows.scale_size = static_cast<int>(c.scale_size), rows.alpha = static_cast<float>(c.alpha);
  rows.activation = c.activation, rows.dropout = keep(c.dropout), rows.gate = c.gate;
  rows.vectors = on_16_bytes(c.dx), rows.to = c.dx, rows.z = c.z, rows.dz = dz, rows.h = h;
  rows.dscale = scale_parts, rows.dgate = c.dgate, rows.fast = launch.fast;

  TallProducts products{};
  products.n = c.n, products.group_rows = p.group_rows, products.fast = launch.fast;
  products.tiles = static_cast<int>(cdiv(c.r, kGradientRanks));
  int64_t widest = 0;
  if (p.down) {
    // Without dw_down the sums of dz alone are wanted: dz serves as the other operand, of which nothing is kept.
    const Source x = c.dw_down ? source(c.x, c.n, c.d_in) : source(dz, c.n, 0);
    products.products[products.count++] = {source(dz, c.n, c.r), x, nullptr, floats(static_cast<bool>(c.dw_down), p.at_w_down),
                                           floats(static_cast<bool>(c.db_down), p.at_b_down), nullptr, c.d_in, 1};
    widest = c.d_in;
  }
  if (p.up) {
    // Of sums of g alone the other operand has no columns.
    const Source other = p.h ? source(h, c.n, c.r) : source(c.g, c.n, 0);
    products.products[products.count++] = {other, source(c.g, c.n, c.d_out), nullptr, floats(p.h, p.at_w_up),
                                           nullptr, floats(p.sums_g, p.at_b_up), 1, c.r, c.gate};
    widest = std::max(widest, c.d_out);
  }

  int64_t row_blocks = 0;
  with_type(c.g.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (p.first || p.h) row_blocks = by_rows<T, true>(rows, launch, c.add_g && c.dx, p.tall);
    if (products.count == 0) return;
    const dim3 grid(static_cast<unsigned>(cdiv(widest, kGradientWidth<T>)),
                    static_cast<unsigned>(products.count * products.tiles), static_cast<unsigned>(p.groups));
    petl::cuda::launch(tall_products_kernel<T, false>, grid, kThreads, tall_shared_bytes<T>(),
                       launch.stream, products);
  });
  if (products.count == 0 && !p.dscale) return;
  const Sums sums{p.groups, row_blocks, c.d_in, c.r, c.d_out,
                  floats(p.down, p.at_w_down), floats(p.h, p.at_w_up), floats(p.down, p.at_b_down),
                  floats(p.sums_g, p.at_b_up), scale_parts, c.dw_down, c.dw_up, c.db_down, c.db_up, c.dscale,
                  c.w_up, c.b_up, c.scale, static_cast<int>(c.scale_size), static_cast<float>(c.alpha)};
  const int64_t longest = std::max({c.dw_down ? c.r * c.d_in : 0, c.dw_up ? c.d_out * c.r : 0, c.r, c.d_out,
                                    p.channel_scale ? kWarp * c.d_out : 0});
  petl::cuda::launch(adapter_sums_kernel, dim3(static_cast<unsigned>(cdiv(longest, kThreads)), 5), kThreads, 0,
                     launch.stream, sums);
}

}  // namespace petl::cuda
