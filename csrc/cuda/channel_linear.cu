// The gradient of the trained part of `channel_linear`: picked^T dense, where the chosen columns are gathered on their way
// to shared memory. Two launches: partial products by groups of rows, and their sum.
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "weight_gradient.h"

namespace petl::cuda {
namespace {

struct GradientSums {
  int64_t groups, size, k;
  const float *dw_parts, *db_parts;
  Rows dw, db;
};

// An element per thread: those of dw, then those of db.
__global__ void __launch_bounds__(kThreads) channel_gradient_sums_kernel(const __grid_constant__ GradientSums call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, j = i - call.size;
  if (i < call.size) {
    store_float(call.dw.data, call.dw.dtype, i, sum_groups(call.dw_parts, call.groups, call.size, i));
  } else if (call.db.data && j < call.k) {
    store_float(call.db.data, call.db.dtype, j, sum_groups(call.db_parts, call.groups, call.k, j));
  }
}

// Operands of two dtypes meet in float.
DType product_dtype(const ChannelGradient& c) {
  return !c.dense || c.dense.dtype == c.picked.dtype ? c.picked.dtype : DType::kFloat32;
}

Groups plan(const ChannelGradient& c, const Launch& launch) {
  const int64_t width = 256 / element_bytes(product_dtype(c));
  const int64_t d = c.dw ? c.d : 1, tiles = cdiv(c.k, kGradientRanks) * cdiv(d, width);
  // 8 k d bytes of partial sums, written and read, against 2 rows (k + d) of the operands.
  return groups_of(c.n, tiles, std::max<int64_t>(kGroupRows, 4 * c.k * d / (c.k + d)), launch.processors);
}

int64_t dw_bytes(const ChannelGradient& c, int64_t groups) { return c.dw ? round_up(groups * c.k * c.d * 4, 16) : 0; }

}  // namespace

int64_t channel_gradient_workspace(const ChannelGradient& c, const Launch& launch) {
  const int64_t groups = plan(c, launch).count;
  return dw_bytes(c, groups) + (c.db ? groups * c.k * 4 : 0);
}

void channel_gradient(const ChannelGradient& c, const Launch& launch, void* workspace) {
  const DeviceGuard guard(launch.device);
  const Groups groups = plan(c, launch);
  float* const dw_parts = c.dw ? static_cast<float*>(workspace) : nullptr;
  auto* const after = static_cast<unsigned char*>(workspace) + dw_bytes(c, groups.count);
  float* const db_parts = c.db ? reinterpret_cast<float*>(after) : nullptr;
  TallProducts products{};
  products.n = c.n, products.group_rows = groups.rows, products.fast = launch.fast;
  products.count = 1, products.tiles = static_cast<int>(cdiv(c.k, kGradientRanks));
  const Source dense = c.dw ? source(c.dense, c.n, c.d) : source(c.picked, c.n, 0);
  products.products[0] = {source(c.picked, c.n, c.k), dense, c.channels, dw_parts, db_parts, nullptr,
                          c.transposed ? 1 : c.d, c.transposed ? c.k : 1};
  with_type(product_dtype(c), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const dim3 grid(static_cast<unsigned>(std::max<int64_t>(1, cdiv(dense.cols, kGradientWidth<T>))),
                    static_cast<unsigned>(products.tiles), static_cast<unsigned>(groups.count));
    const auto kernel = c.channels ? tall_products_kernel<T, true> : tall_products_kernel<T, false>;
    petl::cuda::launch(kernel, grid, kThreads, tall_shared_bytes<T>(), launch.stream, products);
  });
  const int64_t size = c.dw ? c.k * c.d : 0;
  const GradientSums sums{groups.count, size, c.k, dw_parts, db_parts, c.dw, c.db};
  petl::cuda::launch(channel_gradient_sums_kernel, dim3(static_cast<unsigned>(cdiv(size + c.k, kThreads))), kThreads, 0,
                     launch.stream, sums);
}

}  // namespace petl::cuda
