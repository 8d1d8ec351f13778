// The CUDA kernels of the gradient of chosen channels, their sources run on the emulator, against a plain loop in double.
#define PETL_EMULATE
#include "channel_linear.h"

#include "../cuda/channel_linear.cu"

namespace {

void run(const GradientSizes& s, DType picked_dtype, DType dense_dtype, DType out_dtype, bool transposed, bool gather) {
  GradientCase c = gradient_case(s, picked_dtype, dense_dtype, transposed, gather);
  const std::string name = text("n=", s.n, " k=", s.k, " d=", s.d, " ", dtype_name(picked_dtype), " ",
                                dtype_name(dense_dtype), transposed ? " transposed " : " ", gather ? "gathered " : "");
  for (const std::string only : {"", "dw", "db"}) {
    if (!only.empty() && (picked_dtype != DType::kBFloat16 || s.n > 200)) continue;  // seconds of emulation
    Stored dw(transposed ? s.d : s.k, transposed ? s.k : s.d, out_dtype), db(1, s.k, out_dtype);
    const bool wants_dw = only != "db", wants_db = only != "dw";
    const ChannelGradient call{s.n, s.k, s.d, c.picked.rows(), gather ? c.channels.data() : nullptr,
                               wants_dw ? c.dense.rows() : Rows{}, transposed, wants_dw ? dw.rows() : Rows{},
                               wants_db ? db.rows() : Rows{}, 0};
    const petl::cuda::Launch launch{0, nullptr, 3, 99 * 1024, false};
    std::vector<unsigned char> workspace(static_cast<size_t>(petl::cuda::channel_gradient_workspace(call, launch)), 0xff);
    petl::cuda::channel_gradient(call, launch, workspace.data());
    if (wants_dw) compare(name + "dw", dw, c.dw, tolerance(out_dtype));
    if (wants_db) compare(name + "db", db, c.db, tolerance(out_dtype));
  }
  expect(petl::cuda::emulator::machine.counters.collisions == 0, name + "bank conflicts");
}

}  // namespace

int main() {
  constexpr DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  for (const GradientSizes& s : {GradientSizes{1, 1, 1, 0}, {33, 16, 64, 8}, {225, 29, 140, 1}, {70, 72, 40, 0}}) {
    for (const bool transposed : {false, true}) {
      for (const DType dtype : {f32, bf16, f16}) run(s, dtype, dtype, dtype, transposed, !transposed);
    }
    run(s, bf16, bf16, f32, false, true);
    run(s, f32, bf16, f32, true, false);
    run(s, bf16, f32, f32, false, true);
  }
  return finish();
}
