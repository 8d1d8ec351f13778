// The bottleneck adapter on wgmma, TMA and clusters. Compiled for sm_90a alone.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "adapter_backward_sm90.h"
#include "adapter_forward_sm90.h"
#include "kernels.h"

namespace petl::cuda {
namespace {

constexpr int64_t kRanks = 64;  // the width of a tile
constexpr int64_t kProcessorBytes = 228 * 1024, kReservedBytes = 1024;  // shared memory: of a processor; of a block, unseen

// TMA's condition, and that of both products: one 16-bit dtype, rows on 16 bytes.
void require_rows(const Rows& m, DType dtype, const char* name) {
  if (!m || (m.dtype == dtype && element_bytes(dtype) == 2 && on_16_bytes(m))) return;
  throw std::invalid_argument(std::string("bottleneck_adapter, sm_90a: ") + name +
                              " must be of the one 16-bit dtype, its rows on 16 bytes");
}

// What a backward launches, and where in the workspace it keeps what.
struct BackwardPlan {
  int64_t cluster, clusters, flag_bytes, bytes;
  bool sums;
};
template <typename T>
BackwardPlan plan(const BottleneckBackward& c, const Launch& launch) {
  BackwardPlan p{};
  p.sums = c.dw_down || c.db_down || c.dw_up || c.db_up || c.dscale;
  p.cluster = cdiv(std::max(c.d_in, c.d_out), kClusterCols);
  const int64_t most = clusters_at_once(adapter_backward_sm90_kernel<T>, static_cast<int>(p.cluster), kThreads, kBackwardBytes,
                                        launch.processors);
  p.clusters = std::max<int64_t>(std::min(most, cdiv(c.n, kTileRows)), 1);
  if (!p.sums || p.clusters == 1) return p;
  // A tree of that many leaves has less than twice as many nodes, and a level of each size.
  p.flag_bytes = round_up(2 * p.clusters * p.cluster * 4, 16);
  p.bytes = p.flag_bytes + p.clusters * p.cluster * kBackwardSums * kThreads * 4;
  return p;
}

template <typename F>
void with_half(DType dtype, F f) {
  if (dtype == DType::kBFloat16) return f(static_cast<bf16*>(nullptr));
  return f(static_cast<f16*>(nullptr));
}

void require_backward(const BottleneckBackward& c) {
  const DType dtype = c.g.dtype;
  require_rows(c.g, dtype, "g"), require_rows(c.dx, dtype, "dx"), require_rows(c.z, dtype, "z");
  if (c.dw_down) require_rows(c.x, dtype, "x");
  if (c.r > kRanks || std::max(c.d_in, c.d_out) > kMostBlocks * kClusterCols) {
    throw std::invalid_argument("bottleneck_adapter, sm_90a: the backward takes r up to 64 and d up to 1024");
  }
}

}  // namespace

void bottleneck_forward_sm90(const BottleneckForward& c, const Launch& launch) {
  const DType dtype = c.x.dtype;
  require_rows(c.x, dtype, "x"), require_rows(c.w_down, dtype, "w_down"), require_rows(c.w_up, dtype, "w_up");
  require_rows(c.residual, dtype, "residual"), require_rows(c.y, dtype, "y"), require_rows(c.z, dtype, "z");
  if (c.r > kRanks) throw std::invalid_argument("bottleneck_adapter, sm_90a: the bottleneck is wider than 64");
  const int64_t tiles = forward_tiles(c.d_in, c.d_out);
  // As many stages as leave room for a second block, at least two of them.
  int64_t stages = 4;
  const auto bytes = [&] { return forward_shared_bytes(tiles, stages); };
  while (stages > 2 && 2 * (bytes() + kReservedBytes) > kProcessorBytes) --stages;
  if (2 * (bytes() + kReservedBytes) > kProcessorBytes) stages = 4;
  if (bytes() > launch.shared_bytes) stages = 2;
  if (bytes() > launch.shared_bytes) {
    throw std::invalid_argument("bottleneck_adapter, sm_90a: rows are too long for the shared memory of this device");
  }

  const DeviceGuard guard(launch.device);
  AdapterForward90 call{};
  call.x = tensor_map(c.x, c.n, c.d_in), call.y = tensor_map(c.y, c.n, c.d_out);
  call.w_down = tensor_map(c.w_down, c.r, c.d_in), call.w_up = tensor_map(c.w_up, c.d_out, c.r);
  const bool is_x = c.residual && c.residual.data == c.x.data && c.residual.stride == c.x.stride && c.d_in == c.d_out;
  call.added = !c.residual ? Residual::kNone : is_x ? Residual::kX : Residual::kOther;
  if (call.added == Residual::kOther) call.residual = tensor_map(c.residual, c.n, c.d_out);
  call.n = c.n, call.d_in = static_cast<int>(c.d_in), call.r = static_cast<int>(c.r), call.d_out = static_cast<int>(c.d_out);
  call.stages = static_cast<int>(stages), call.b_down = c.b_down, call.b_up = c.b_up, call.scale = c.scale, call.z = c.z;
  call.scale_size = static_cast<int>(c.scale_size), call.alpha = static_cast<float>(c.alpha), call.activation = c.activation;
  with_half(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch_clusters(adapter_forward_sm90_kernel<T>, cdiv(c.n, kTileRows), 1, kForwardThreads, bytes(), launch.stream, call);
  });
}

int64_t bottleneck_workspace_sm90(const BottleneckBackward& c, const Launch& launch) {
  require_backward(c);
  const DeviceGuard guard(launch.device);
  int64_t bytes = 0;
  with_half(c.g.dtype, [&](auto* tag) { bytes = plan<std::remove_pointer_t<decltype(tag)>>(c, launch).bytes; });
  return bytes;
}

void bottleneck_backward_sm90(const BottleneckBackward& c, const Launch& launch, void* workspace) {
  require_backward(c);
  const DeviceGuard guard(launch.device);
  AdapterBackward90 call{};
  call.wants_x = static_cast<bool>(c.dw_down), call.wants_dx = static_cast<bool>(c.dx), call.add_g = c.add_g;
  call.g = tensor_map(c.g, c.n, c.d_out);
  if (c.dw_down) call.x = tensor_map(c.x, c.n, c.d_in);
  if (c.dx) call.dx = tensor_map(c.dx, c.n, c.d_in);
  call.n = c.n, call.d_in = static_cast<int>(c.d_in), call.r = static_cast<int>(c.r), call.d_out = static_cast<int>(c.d_out);
  call.w_down = source(c.w_down, c.r, c.d_in), call.w_up = source(c.w_up, c.d_out, c.r), call.param_w_up = c.w_up;
  call.z = c.z, call.b_up = c.b_up, call.scale = c.scale, call.scale_size = static_cast<int>(c.scale_size);
  call.alpha = static_cast<float>(c.alpha), call.activation = c.activation;
  call.dw_down = c.dw_down, call.db_down = c.db_down, call.dw_up = c.dw_up, call.db_up = c.db_up, call.dscale = c.dscale;
  with_half(c.g.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const BackwardPlan p = plan<T>(c, launch);
    if (!p.sums && !c.dx) return;
    call.cluster = static_cast<int>(p.cluster), call.wants_sums = p.sums;
    call.flags = static_cast<unsigned*>(workspace);
    call.parts = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + p.flag_bytes);
    if (p.flag_bytes) zero_async(workspace, p.flag_bytes, launch.stream);
    launch_clusters(adapter_backward_sm90_kernel<T>, p.clusters * p.cluster, call.cluster, kThreads, kBackwardBytes,
                    launch.stream, call);
  });
}

}  // namespace petl::cuda
