// Every instruction set this processor has against a plain loop in double.
#include "channel_linear.h"

namespace {

void run(const std::string& isa, const GradientSizes& s, DType picked_dtype, DType dense_dtype, DType out_dtype,
         bool transposed, bool gather, int threads) {
  GradientCase c = gradient_case(s, picked_dtype, dense_dtype, transposed, gather);
  Stored dw(transposed ? s.d : s.k, transposed ? s.k : s.d, out_dtype), db(1, s.k, out_dtype);
  const int64_t* chosen = gather ? c.channels.data() : nullptr;
  kernels().channel_gradient(
      {s.n, s.k, s.d, c.picked.rows(), chosen, c.dense.rows(), transposed, dw.rows(), db.rows(), threads});
  const std::string name = text(isa, " n=", s.n, " k=", s.k, " d=", s.d, " ", dtype_name(picked_dtype), " ",
                                dtype_name(dense_dtype), " ", dtype_name(out_dtype), transposed ? " transposed " : " ");
  compare(name + "dw", dw, c.dw, tolerance(out_dtype));
  compare(name + "db", db, c.db, tolerance(out_dtype));
  if (gather) {  // the sum alone, without the dense operand
    Stored alone(1, s.k, out_dtype);
    kernels().channel_gradient({s.n, s.k, s.d, c.picked.rows(), chosen, {}, false, {}, alone.rows(), threads});
    compare(name + "db alone", alone, c.db, tolerance(out_dtype));
  }
}

}  // namespace

int main() {
  constexpr DType f64 = DType::kFloat64, f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  const GradientSizes sizes[] = {{1, 1, 1, 0},     {2, 3, 16, 5},   {15, 14, 32, 0}, {256, 15, 33, 3},
                                 {257, 29, 64, 0}, {513, 5, 31, 1}, {700, 40, 100, 0}};
  return in_every_isa([&](const std::string& isa) {
    for (const GradientSizes& s : sizes) {
      for (bool transposed : {false, true}) {
        run(isa, s, f64, f64, f64, transposed, true, 2);
        for (DType dtype : {f32, bf16, f16}) run(isa, s, dtype, dtype, dtype, transposed, !transposed, 2);
        run(isa, s, bf16, bf16, f32, transposed, true, 3);
        run(isa, s, f32, bf16, f32, transposed, true, 1);
        run(isa, s, bf16, f32, f32, transposed, true, 2);
      }
    }
  });
}
