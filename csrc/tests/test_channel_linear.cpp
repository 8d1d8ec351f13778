// Every instruction set this processor has against a plain loop in double.
#include "testing.h"

namespace {

struct Sizes {
  int64_t n, k, d, gap;
};

void run(const std::string& isa, Sizes s, DType picked_dtype, DType dense_dtype, DType out_dtype, bool transposed,
         bool gather, int threads) {
  std::mt19937 rng(static_cast<unsigned>(s.n * 31 + s.k * 7 + s.d));
  const int64_t width = gather ? 2 * s.k + 1 : s.k;
  Stored picked(rng, s.n, width, picked_dtype, s.gap), dense(rng, s.n, s.d, dense_dtype, s.gap);
  const std::vector<int64_t> channels = choose(rng, s.k, width);

  Values want_dw(static_cast<size_t>(s.k * s.d)), want_db(static_cast<size_t>(s.k));
  for (int64_t i = 0; i < s.n; ++i) {
    for (int64_t j = 0; j < s.k; ++j) {
      const int64_t channel = gather ? channels[static_cast<size_t>(j)] : j;
      const double value = picked(i, channel);
      want_db[static_cast<size_t>(j)] += value;
      for (int64_t c = 0; c < s.d; ++c) {
        const auto at = static_cast<size_t>(transposed ? c * s.k + j : j * s.d + c);
        want_dw[at] += value * dense(i, c);
      }
    }
  }
  Stored dw(transposed ? s.d : s.k, transposed ? s.k : s.d, out_dtype), db(1, s.k, out_dtype);
  const int64_t* chosen = gather ? channels.data() : nullptr;
  kernels().channel_gradient(
      {s.n, s.k, s.d, picked.rows(), chosen, dense.rows(), transposed, dw.rows(), db.rows(), threads});
  const std::string name = text(isa, " n=", s.n, " k=", s.k, " d=", s.d, " ", dtype_name(picked_dtype), " ",
                                dtype_name(dense_dtype), " ", dtype_name(out_dtype), transposed ? " transposed " : " ");
  compare(name + "dw", dw, want_dw, tolerance(out_dtype));
  compare(name + "db", db, want_db, tolerance(out_dtype));
  if (gather) {  // the sum alone, without the dense operand
    Stored alone(1, s.k, out_dtype);
    kernels().channel_gradient({s.n, s.k, s.d, picked.rows(), chosen, {}, false, {}, alone.rows(), threads});
    compare(name + "db alone", alone, want_db, tolerance(out_dtype));
  }
}

}  // namespace

int main() {
  constexpr DType f64 = DType::kFloat64, f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  const Sizes sizes[] = {{1, 1, 1, 0},     {2, 3, 16, 5},   {15, 14, 32, 0}, {256, 15, 33, 3},
                         {257, 29, 64, 0}, {513, 5, 31, 1}, {700, 40, 100, 0}};
  return in_every_isa([&](const std::string& isa) {
    for (const Sizes& s : sizes) {
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
