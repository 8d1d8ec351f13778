// Every instruction set this processor has against plain loops in double, on buffers of the exact size, so that the
// sanitizers see a read or write past the end.
#include "bottleneck_adapter.h"

namespace {

void run(const std::string& isa, AdapterSizes s, DType dtype, DType weights, Activation activation, int64_t scale_size,
         bool sequential, int threads, double dropout = 0, bool gated = false) {
  AdapterOptions options;
  options.dtype = dtype, options.weights = weights, options.activation = activation, options.scale_size = scale_size;
  options.sequential = sequential, options.dropout = dropout, options.gated = gated;
  AdapterCase call(s, options);
  kernels().bottleneck_forward(call.forward(threads));
  kernels().bottleneck_backward(call.backward(threads));
  call.check(isa, dtype == DType::kFloat64 ? 1e-8 : tolerance(dtype));  // of fp64 that of the central difference
}

}  // namespace

int main() {
  const AdapterSizes sizes[] = {{1, 1, 1, 1, 0},    {1, 16, 8, 16, 0},  {5, 33, 3, 33, 7},    {14, 32, 16, 32, 0},
                         {17, 48, 24, 48, 3}, {29, 100, 33, 100, 0}, {97, 64, 65, 64, 1}, {211, 31, 5, 31, 0}};
  const DType half_or_single[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  return in_every_isa([&](const std::string& isa) {
    for (const AdapterSizes& s : sizes) {
      run(isa, s, DType::kFloat64, DType::kFloat64, Activation::kGelu, s.d_out, true, 1);
      for (DType dtype : half_or_single) run(isa, s, dtype, dtype, Activation::kGelu, 0, true, 2);
      run(isa, s, DType::kBFloat16, DType::kFloat32, Activation::kSilu, 1, false, 3);
      run(isa, s, DType::kFloat64, DType::kFloat64, Activation::kTanh, 1, false, 1, 0.4, true);
      run(isa, s, DType::kFloat32, DType::kFloat32, Activation::kSoftmax, s.d_out, false, 2, 0.25, true);
      run(isa, s, DType::kFloat32, DType::kFloat32, Activation::kGelu, 0, false, 2, 0.1);
      run(isa, s, DType::kBFloat16, DType::kFloat32, Activation::kGelu, 0, false, 2, 0, true);
    }
    for (int a = 0; a <= static_cast<int>(Activation::kSoftmax); ++a) {
      run(isa, {23, 40, 12, 56, 2}, DType::kFloat32, DType::kFloat32, static_cast<Activation>(a), 56, false, 2);
      run(isa, {23, 40, 12, 56, 2}, DType::kFloat64, DType::kFloat64, static_cast<Activation>(a), 1, false, 2);
    }
  });
}
