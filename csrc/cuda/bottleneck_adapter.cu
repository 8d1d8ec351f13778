// The bottleneck adapter. Forward: one launch. Backward: dz and dx by rows, the partial gradients of the weights by groups
// of rows, and the sum over the groups.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "adapter_gradients.h"
#include "adapter_rows.h"
#include "kernels.h"

namespace petl::cuda {
namespace {

// --- by rows ---------------------------------------------------------------------------------------------------------

template <typename T, int kRanks, int kBlockM, bool kBackward>
void launch_rows(const AdapterRows& rows, const Launch& launch, int64_t shared_bytes) {
  petl::cuda::launch(adapter_rows_kernel<T, kRanks, kBlockM, kBackward>, dim3(static_cast<unsigned>(cdiv(rows.n, kBlockM))),
                     kThreads, shared_bytes, launch.stream, rows);
}

// The first of these that fits a block's shared memory: as wanted, not resident, 32 rows, both. Returns the blocks.
template <typename T, bool kBackward, int kRanks>
int64_t plan_rows(AdapterRows rows, const Launch& launch, bool resident, bool tall) {
  for (const bool tall_block : {true, false}) {
    for (const bool stays : {true, false}) {
      if ((tall_block && !tall) || (stays && !resident)) continue;
      rows.resident = stays;
      const int64_t bytes = adapter_shared_bytes<T>(rows, tall_block ? 64 : 32, kStages<kRanks>);
      if (bytes > launch.shared_bytes) continue;
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

}  // namespace

void bottleneck_forward(const BottleneckForward& c, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  const AdapterRows rows = forward_rows(c, launch);
  const bool resident = c.residual && c.residual.data == c.x.data && c.residual.stride == c.x.stride && c.d_in == c.d_out;
  with_type(c.x.dtype, [&](auto* tag) {
    by_rows<std::remove_pointer_t<decltype(tag)>, false>(rows, launch, resident, tall_blocks(c.n, launch));
  });
}

int64_t bottleneck_workspace(const BottleneckBackward& call, const Launch& launch) { return plan_gradients(call, launch).bytes; }

void bottleneck_backward(const BottleneckBackward& c, const Launch& launch, void* workspace) {
  const DeviceGuard guard(launch.device);
  const GradientPlan p = plan_gradients(c, launch);
  const AdapterRows rows = backward_rows(c, p, launch, workspace);
  with_type(c.z.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    int64_t row_blocks = 0;
    if (p.first || p.h) row_blocks = by_rows<T, true>(rows, launch, c.add_g && c.dx, p.tall);
    launch_gradients<T, false>(c, p, launch, workspace, row_blocks, {}, {});
  });
}

}  // namespace petl::cuda
