// The adapter with a norm behind it or in front. Forward: one launch. Backward: du, dz and dx by rows, with partial
// gradients of the norm's parameters, then what follows any adapter's rows (adapter_gradients.h); of the pre-norm the rows
// of x are normalised on their way.
#include <stdexcept>
#include <type_traits>

#include "adapter_gradients.h"
#include "norm_rows.h"

namespace petl::cuda {
namespace {

Source parameter(const Rows& m, int64_t d) { return source({m.data, m.dtype, 0}, 1, d); }

NormRows norm_rows(const AdapterRows& adapter, const Norm& norm, bool post, int64_t d) {
  NormRows rows{};
  rows.adapter = adapter, rows.post = post;
  rows.weight = parameter(norm.weight, d), rows.bias = parameter(norm.bias, d);
  rows.eps = static_cast<float>(norm.eps), rows.rms = norm.rms, rows.mean = norm.mean, rows.rstd = norm.rstd;
  return rows;
}

struct BlockPlan {
  bool tall, stays;
  int64_t shared_bytes, blocks;
};

// The tallest blocks whose rows stay in shared memory; where none can, the tallest whose rows do not. Beside wide
// bottlenecks 32 rows: a kernel less to compile of every four.
template <typename T>
BlockPlan plan_blocks(AdapterRows rows, bool made, bool resident, const Launch& launch) {
  const int stages = rows.r > 64 ? kStages<256> : kStages<64>;
  for (const bool stays : {true, false}) {
    rows.made = made && stays, rows.resident = resident && stays;
    for (const bool tall : {true, false}) {
      if (tall && (rows.r > 64 || !tall_blocks(rows.n, launch))) continue;
      const int64_t height = tall ? 64 : 32, bytes = adapter_shared_bytes<T>(rows, height, stages);
      if (rows.r <= 256 && bytes <= launch.shared_bytes) return {tall, stays, bytes, cdiv(rows.n, height)};
    }
  }
  throw std::invalid_argument("adapter with a norm: the bottleneck is too wide for the shared memory of this device");
}

template <typename T, bool kBackward>
void launch_rows(const NormRows& rows, const BlockPlan& plan, const Launch& launch) {
  const auto kernel = rows.adapter.r > 64 ? norm_rows_kernel<T, 256, 32, kBackward>
                      : plan.tall         ? norm_rows_kernel<T, 64, 64, kBackward>
                                          : norm_rows_kernel<T, 64, 32, kBackward>;
  petl::cuda::launch(kernel, dim3(static_cast<unsigned>(plan.blocks)), kThreads, plan.shared_bytes, launch.stream, rows);
}

// Rows for what does not stay in shared memory, on 16 bytes.
Rows scratch_rows(void* at, DType dtype, int64_t d) { return {at, dtype, round_up(d, 16 / element_bytes(dtype))}; }
int64_t scratch_bytes(int64_t n, DType dtype, int64_t d) {
  return round_up(n * scratch_rows(nullptr, dtype, d).stride * element_bytes(dtype), 16);
}

BlockPlan plan_forward(const AdapterRows& rows, bool post, DType dtype, const Launch& launch) {
  BlockPlan plan;
  with_type(dtype, [&](auto* tag) { plan = plan_blocks<std::remove_pointer_t<decltype(tag)>>(rows, !post, post, launch); });
  return plan;
}
int64_t forward_workspace(const AdapterRows& rows, bool post, DType dtype, const Launch& launch) {
  return plan_forward(rows, post, dtype, launch).stays ? 0 : scratch_bytes(rows.n, dtype, post ? rows.d_to : rows.d_from);
}

struct NormBackward {
  BottleneckBackward adapter;  // `g` is the gradient that the products begin with
  GradientPlan gradients;
  AdapterRows rows;
  BlockPlan blocks;
  Rows scratch;  // du where it has to be in global memory and is no result
  NormSums sums;
  int64_t bytes;
};

// `dsum`: of the post-norm, where it is wanted.
NormBackward plan_backward(const BottleneckBackward& call, const Rows& dweight, const Rows& dbias, bool post,
                                  const Rows& dsum, const Launch& launch, void* workspace) {
  NormBackward p{};
  p.adapter = call, p.gradients = plan_gradients(call, launch);
  const bool norm = dweight || dbias, through = !post && norm;  // the pre-norm's gradients come from du = dz w_down
  p.gradients.first |= through;
  p.rows = backward_rows(call, p.gradients, launch, workspace);
  if (through) p.rows.d_to = static_cast<int>(call.d_in);
  with_type(call.z.dtype, [&](auto* tag) {
    p.blocks = plan_blocks<std::remove_pointer_t<decltype(tag)>>(p.rows, post && p.gradients.first, true, launch);
  });
  const int64_t d = post ? call.d_out : call.d_in;
  const bool spilled = !p.blocks.stays && (post ? p.gradients.first : p.rows.d_to > 0);
  unsigned char* const at = at_byte(workspace, p.gradients.bytes);
  const bool rows = !dsum && (spilled || (post && p.gradients.up));
  const int64_t bytes = rows ? scratch_bytes(call.n, call.z.dtype, d) : 0;
  if (rows) p.scratch = scratch_rows(at, call.z.dtype, d);
  if (norm) p.sums = {reinterpret_cast<float*>(at_byte(at, bytes)), d, dweight, dbias};
  p.bytes = p.gradients.bytes + bytes + (norm ? p.blocks.blocks * 2 * d * 4 : 0);
  return p;
}

// `normal`: how rows of x come to those that w_down met, unless they are these.
void launch_backward(const NormBackward& p, NormRows rows, const Normal& normal, const Launch& launch, void* workspace) {
  rows.parts = const_cast<float*>(p.sums.parts);
  rows.vectors[0] = on_16_bytes(rows.out[0]);
  with_type(p.adapter.z.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch_rows<T, true>(rows, p.blocks, launch);
    launch_gradients<T, true>(p.adapter, p.gradients, launch, workspace, p.blocks.blocks, normal, p.sums);
  });
}

// The products add `hidden` where it is x itself; any other term is the row pass's.
AdapterRows post_rows(const AdapterNormForward& c, const Launch& launch) {
  const BottleneckForward& f = c.adapter;
  AdapterRows rows = forward_rows(f, launch);
  const bool sequential = c.hidden && c.hidden.data == f.x.data && c.hidden.stride == f.x.stride && f.d_in == f.d_out;
  rows.residual = sequential ? rows.from : Source{};
  return rows;
}

NormBackward plan_post(const AdapterNormBackward& c, const Launch& launch, void* workspace) {
  NormBackward p = plan_backward(c.adapter, c.dweight, c.dbias, true, c.dsum, launch, workspace);
  p.adapter.g = c.dsum ? c.dsum : p.scratch;
  return p;
}
NormBackward plan_pre(const NormAdapterBackward& c, const Launch& launch, void* workspace) {
  return plan_backward(c.adapter, c.dweight, c.dbias, false, {}, launch, workspace);
}

}  // namespace

int64_t adapter_norm_forward_workspace(const AdapterNormForward& c, const Launch& launch) {
  return forward_workspace(post_rows(c, launch), true, c.adapter.x.dtype, launch);
}
void adapter_norm_forward(const AdapterNormForward& c, const Launch& launch, void* workspace) {
  const DeviceGuard guard(launch.device);
  const BottleneckForward& f = c.adapter;
  const AdapterRows adapter = post_rows(c, launch);
  const BlockPlan plan = plan_forward(adapter, true, f.x.dtype, launch);
  NormRows rows = norm_rows(adapter, c.norm, true, f.d_out);
  rows.adapter.resident = rows.adapter.kept = plan.stays;
  if (!plan.stays) rows.adapter.to = rows.scratch = scratch_rows(workspace, f.x.dtype, f.d_out), rows.adapter.vectors = true;
  rows.in[0] = source(f.residual, f.n, f.d_out);
  if (!adapter.residual.data) rows.in[1] = source(c.hidden, f.n, f.d_out);
  rows.out[0] = f.y, rows.out[1] = c.normal;
  for (int k = 0; k < 2; ++k) rows.vectors[k] = on_16_bytes(rows.out[k]);
  with_type(f.x.dtype, [&](auto* tag) { launch_rows<std::remove_pointer_t<decltype(tag)>, false>(rows, plan, launch); });
}

int64_t adapter_norm_workspace(const AdapterNormBackward& c, const Launch& launch) { return plan_post(c, launch, nullptr).bytes; }
void adapter_norm_backward(const AdapterNormBackward& c, const Launch& launch, void* workspace) {
  const DeviceGuard guard(launch.device);
  const BottleneckBackward& b = c.adapter;
  const NormBackward p = plan_post(c, launch, workspace);
  NormRows rows = norm_rows(p.rows, c.norm, true, b.d_out);
  rows.in[0] = source(b.g, b.n, b.d_out), rows.in[1] = source(c.normal, b.n, b.d_out), rows.out[0] = p.adapter.g;
  rows.adapter.resident = p.blocks.stays, rows.adapter.made = p.blocks.stays && p.gradients.first;
  rows.adapter.from = source(p.adapter.g, b.n, b.d_out);
  rows.adapter.residual = b.add_g ? rows.adapter.from : Source{};
  if (b.add_g && p.blocks.stays) rows.adapter.residual.data = rows.in[0].data;  // only whether there is one
  launch_backward(p, rows, {}, launch, workspace);
}

int64_t norm_adapter_forward_workspace(const NormAdapterForward& c, const Launch& launch) {
  return forward_workspace(forward_rows(c.adapter, launch), false, c.adapter.x.dtype, launch);
}
void norm_adapter_forward(const NormAdapterForward& c, const Launch& launch, void* workspace) {
  const DeviceGuard guard(launch.device);
  const BottleneckForward& f = c.adapter;
  const AdapterRows adapter = forward_rows(f, launch);
  const BlockPlan plan = plan_forward(adapter, false, f.x.dtype, launch);
  NormRows rows = norm_rows(adapter, c.norm, false, f.d_in);
  rows.in[0] = adapter.from, rows.adapter.made = plan.stays;
  if (!plan.stays) {
    rows.scratch = scratch_rows(workspace, f.x.dtype, f.d_in);
    rows.adapter.from = source(rows.scratch, f.n, f.d_in);
  }
  with_type(f.x.dtype, [&](auto* tag) { launch_rows<std::remove_pointer_t<decltype(tag)>, false>(rows, plan, launch); });
}

int64_t norm_adapter_workspace(const NormAdapterBackward& c, const Launch& launch) { return plan_pre(c, launch, nullptr).bytes; }
void norm_adapter_backward(const NormAdapterBackward& c, const Launch& launch, void* workspace) {
  const DeviceGuard guard(launch.device);
  const BottleneckBackward& b = c.adapter;
  const NormBackward p = plan_pre(c, launch, workspace);
  NormRows rows = norm_rows(p.rows, c.norm, false, b.d_in);
  rows.in[0] = source(b.x, b.n, b.d_in), rows.in[1] = source(b.add_g ? b.g : Rows{}, b.n, b.d_in), rows.out[0] = b.dx;
  rows.adapter.residual = {}, rows.adapter.resident = rows.adapter.kept = p.blocks.stays;
  if (!p.blocks.stays) rows.adapter.to = rows.scratch = p.scratch, rows.adapter.vectors = true;
  launch_backward(p, rows, {rows.weight, rows.bias, c.norm.mean, c.norm.rstd}, launch, workspace);
}

}  // namespace petl::cuda
