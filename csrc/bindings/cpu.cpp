// petl_kernels._cpu: the CPU kernels for Python. Pointers and sizes come in, nothing of torch; the caller holds the
// tensors, and the interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/kernels.h"

namespace py = pybind11;
using namespace petl;

namespace {

using Matrix = std::optional<std::tuple<uintptr_t, int, int64_t>>;  // address, dtype, row stride in elements

Rows rows(const Matrix& m) {
  if (!m) return {};
  const auto [address, dtype, stride] = *m;
  return {reinterpret_cast<void*>(address), static_cast<DType>(dtype), stride};
}

void bottleneck_forward(std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, const Matrix& x, const Matrix& w_down,
                        const Matrix& b_down, const Matrix& w_up, const Matrix& b_up, const Matrix& residual,
                        const Matrix& scale, int64_t scale_size, double alpha, int activation, const Matrix& y,
                        const Matrix& z, int threads) {
  const auto [n, d_in, r, d_out] = sizes;
  const BottleneckForward call{n,           d_in,       r,     d_out, rows(x), rows(w_down), rows(b_down), rows(w_up),
                               rows(b_up),  rows(residual), rows(scale), scale_size, alpha,
                               static_cast<Activation>(activation), rows(y), rows(z), threads};
  py::gil_scoped_release release;
  kernels().bottleneck_forward(call);
}

void bottleneck_backward(std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, const Matrix& g, const Matrix& x,
                         const Matrix& z, const Matrix& w_down, const Matrix& w_up, const Matrix& b_up,
                         const Matrix& scale, int64_t scale_size, double alpha, int activation, bool add_g,
                         const Matrix& dx, const Matrix& dw_down, const Matrix& db_down, const Matrix& dw_up,
                         const Matrix& db_up, const Matrix& dscale, int threads) {
  const auto [n, d_in, r, d_out] = sizes;
  const BottleneckBackward call{n,          d_in,        r,          d_out,      rows(g),     rows(x), rows(z),
                                rows(w_down), rows(w_up), rows(b_up), rows(scale), scale_size, alpha,
                                static_cast<Activation>(activation), add_g, rows(dx), rows(dw_down), rows(db_down),
                                rows(dw_up), rows(db_up), rows(dscale), threads};
  py::gil_scoped_release release;
  kernels().bottleneck_backward(call);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of petl_kernels";
  m.def("bottleneck_forward", &bottleneck_forward);
  m.def("bottleneck_backward", &bottleneck_backward);
  m.def("built_isas", &built_isas, "The instruction sets this binary holds kernels for, narrowest first.");
  m.def("isas", &isas, "Those of them that this processor can run.");
  m.def("isa", [] { return kernels().isa; }, "The one in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another one; for measurements and tests.");
}
