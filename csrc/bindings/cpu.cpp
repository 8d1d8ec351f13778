// petl_kernels._cpu: the CPU kernels for Python. Pointers and sizes come in, nothing of torch; the caller holds the
// tensors, and the interpreter lock is released while a kernel runs.
#include "../cpu/kernels.h"
#include "adapter.h"

namespace {

void bottleneck_forward(std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, const Matrix& x, const Matrix& w_down,
                        const Matrix& b_down, const Matrix& w_up, const Matrix& b_up, const Matrix& residual,
                        const Matrix& scale, const Matrix& gate, int64_t scale_size, uintptr_t seed, double dropout,
                        double alpha, int activation, const Matrix& y, const Matrix& z, int threads) {
  const auto [n, d_in, r, d_out] = sizes;
  const BottleneckForward call{n,           d_in,        r,          d_out,       rows(x),    rows(w_down),
                               rows(b_down), rows(w_up),  rows(b_up), rows(residual), rows(scale), rows(gate),
                               scale_size,  {reinterpret_cast<const int64_t*>(seed), dropout}, alpha,
                               static_cast<Activation>(activation), rows(y), rows(z), threads};
  py::gil_scoped_release release;
  kernels().bottleneck_forward(call);
}

void bottleneck_backward(std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, const Matrix& g, const Matrix& x,
                         const Matrix& z, const Matrix& w_down, const Matrix& w_up, const Matrix& b_up,
                         const Matrix& scale, const Matrix& gate, int64_t scale_size, uintptr_t seed, double dropout,
                         double alpha, int activation, bool add_g, const Matrix& dx, const Matrix& dw_down,
                         const Matrix& db_down, const Matrix& dw_up, const Matrix& db_up, const Matrix& dscale,
                         const Matrix& dgate, int threads) {
  const auto [n, d_in, r, d_out] = sizes;
  const BottleneckBackward call{n,          d_in,        r,          d_out,      rows(g),     rows(x), rows(z),
                                rows(w_down), rows(w_up), rows(b_up), rows(scale), rows(gate), scale_size,
                                {reinterpret_cast<const int64_t*>(seed), dropout}, alpha,
                                static_cast<Activation>(activation), add_g, rows(dx), rows(dw_down), rows(db_down),
                                rows(dw_up), rows(db_up), rows(dscale), rows(dgate), threads};
  py::gil_scoped_release release;
  kernels().bottleneck_backward(call);
}

// A table of one row of `fields` numbers per tensor, as `array.array` holds it.
template <typename T>
const T* table(const py::buffer& buffer, int64_t count, int64_t fields) {
  const py::buffer_info info = buffer.request();
  if (info.itemsize != sizeof(T) || info.size != count * fields) throw py::value_error("a table of the wrong size");
  return static_cast<const T*>(info.ptr);
}

// The adapters of a table of four addresses per task (w_down, b_down, w_up, b_up; 0 for none), contiguous, of one dtype.
std::vector<Adapter> adapters(const py::buffer& buffer, int64_t tasks, int dtype, int64_t d_in, int64_t r, int64_t d_out) {
  const int64_t* row = table<int64_t>(buffer, tasks, 4);
  const int64_t strides[] = {d_in, r, r, d_out};
  const auto rows = [&](int i) {
    return Rows{reinterpret_cast<void*>(static_cast<uintptr_t>(row[i])), static_cast<DType>(dtype), strides[i]};
  };
  std::vector<Adapter> list;
  for (int64_t t = 0; t < tasks; ++t, row += 4) list.push_back({rows(0), rows(1), rows(2), rows(3)});
  return list;
}

// Whoever is compiled into a graph was not checked before.
void check_tasks(const int64_t* task, int64_t samples, int64_t tasks) {
  for (int64_t s = 0; s < samples; ++s) {
    if (task[s] >= 0 && task[s] < tasks) continue;
    throw py::value_error("adapter_bank: task must lie in [0, " + std::to_string(tasks) + "), got " +
                          std::to_string(task[s]));
  }
}

void adapter_bank_forward(std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> sizes, uintptr_t task,
                          const py::buffer& parameters, int dtype, const Matrix& x, const Matrix& residual,
                          double scale, int activation, const Matrix& y, const Matrix& z, int threads) {
  const auto [samples, n, d_in, r, d_out, tasks] = sizes;
  const std::vector<Adapter> list = adapters(parameters, tasks, dtype, d_in, r, d_out);
  const auto* of = reinterpret_cast<const int64_t*>(task);
  check_tasks(of, samples, tasks);
  const AdapterBankForward call{samples, n, d_in, r, d_out, tasks, of, list.data(), rows(x), rows(residual), scale,
                                static_cast<Activation>(activation), rows(y), rows(z), threads};
  py::gil_scoped_release release;
  kernels().adapter_bank_forward(call);
}

void adapter_bank_backward(std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> sizes, uintptr_t task,
                           const py::buffer& parameters, const py::buffer& gradients, int dtype, const Matrix& g,
                           const Matrix& x, const Matrix& z, double scale, int activation, bool add_g,
                           const Matrix& dx, int threads) {
  const auto [samples, n, d_in, r, d_out, tasks] = sizes;
  const std::vector<Adapter> list = adapters(parameters, tasks, dtype, d_in, r, d_out);
  const std::vector<Adapter> grads = adapters(gradients, tasks, dtype, d_in, r, d_out);
  const auto* of = reinterpret_cast<const int64_t*>(task);
  check_tasks(of, samples, tasks);
  const AdapterBankBackward call{samples, n, d_in, r, d_out, tasks, of, list.data(), grads.data(), rows(g), rows(x),
                                 rows(z), scale, static_cast<Activation>(activation), add_g, rows(dx), threads};
  py::gil_scoped_release release;
  kernels().adapter_bank_backward(call);
}

void channel_gradient(std::tuple<int64_t, int64_t, int64_t> sizes, const Matrix& picked, uintptr_t channels,
                      const Matrix& dense, bool transposed, const Matrix& dw, const Matrix& db, int threads) {
  const auto [n, k, d] = sizes;
  const ChannelGradient call{n,          k,        d,        rows(picked), reinterpret_cast<const int64_t*>(channels),
                             rows(dense), transposed, rows(dw), rows(db),   threads};
  py::gil_scoped_release release;
  kernels().channel_gradient(call);
}

void channel_adapter_forward(std::tuple<int64_t, int64_t, int64_t> sizes, uintptr_t channels, const Matrix& x,
                             const Matrix& weight, const Matrix& bias, const Matrix& scale, double alpha,
                             bool scale_input, const Matrix& y, const Matrix& x_channels, int threads) {
  const auto [n, d, k] = sizes;
  const ChannelAdapterForward call{n,          d,           k,           reinterpret_cast<const int64_t*>(channels),
                                   rows(x),    rows(weight), rows(bias), rows(scale),
                                   alpha,      scale_input, rows(y),     rows(x_channels),
                                   threads};
  py::gil_scoped_release release;
  kernels().channel_adapter_forward(call);
}

void channel_adapter_backward(std::tuple<int64_t, int64_t, int64_t> sizes, uintptr_t channels, const Matrix& g,
                              const Matrix& x_channels, const Matrix& weight, const Matrix& bias, const Matrix& scale,
                              double alpha, bool scale_input, const Matrix& dx, const Matrix& dweight,
                              const Matrix& dbias, const Matrix& dscale, int threads) {
  const auto [n, d, k] = sizes;
  const ChannelAdapterBackward call{n,           d,           k,           reinterpret_cast<const int64_t*>(channels),
                                    rows(g),     rows(x_channels), rows(weight), rows(bias),
                                    rows(scale), alpha,       scale_input, rows(dx),
                                    rows(dweight), rows(dbias), rows(dscale), threads};
  py::gil_scoped_release release;
  kernels().channel_adapter_backward(call);
}

void channel_importance(std::tuple<int64_t, int64_t, int64_t> sizes, const Matrix& activation, const Matrix& grad,
                        int reduction, const Matrix& scores, int threads) {
  const auto [n, d, sample_rows] = sizes;
  const ChannelImportance call{n,           d, sample_rows, rows(activation), rows(grad), static_cast<Reduction>(reduction),
                               rows(scores), threads};
  py::gil_scoped_release release;
  kernels().channel_importance(call);
}

void channel_scale_forward(std::tuple<int64_t, int64_t> sizes, const Matrix& x, const Matrix& scale, const Matrix& y,
                           int threads) {
  const auto [n, d] = sizes;
  const ChannelScaleForward call{n, d, rows(x), rows(scale), rows(y), threads};
  py::gil_scoped_release release;
  kernels().channel_scale_forward(call);
}

void channel_scale_backward(std::tuple<int64_t, int64_t> sizes, const Matrix& g, const Matrix& x, const Matrix& scale,
                            const Matrix& dx, const Matrix& dscale, int threads) {
  const auto [n, d] = sizes;
  const ChannelScaleBackward call{n, d, rows(g), rows(x), rows(scale), rows(dx), rows(dscale), threads};
  py::gil_scoped_release release;
  kernels().channel_scale_backward(call);
}

void layer_norm_forward(std::tuple<int64_t, int64_t> sizes, const Matrix& x, const Matrix& weight, const Matrix& bias,
                        double eps, const Matrix& y, const Matrix& mean, const Matrix& rstd, int threads) {
  const auto [n, d] = sizes;
  const LayerNormForward call{n, d, rows(x), rows(weight), rows(bias), eps, rows(y), rows(mean), rows(rstd), threads};
  py::gil_scoped_release release;
  kernels().layer_norm_forward(call);
}

void layer_norm_backward(std::tuple<int64_t, int64_t> sizes, const Matrix& g, const Matrix& x, const Matrix& mean,
                         const Matrix& rstd, const Matrix& weight, const Matrix& dx, const Matrix& dweight,
                         const Matrix& dbias, int threads) {
  const auto [n, d] = sizes;
  const LayerNormBackward call{n,        d,           rows(g),       rows(x),     rows(mean), rows(rstd), rows(weight),
                               rows(dx), rows(dweight), rows(dbias), threads};
  py::gil_scoped_release release;
  kernels().layer_norm_backward(call);
}

void adapter_norm_forward(const BottleneckForward& adapter, const Matrix& hidden, const Norm& norm,
                          const Matrix& normal) {
  py::gil_scoped_release release;
  kernels().adapter_norm_forward({adapter, rows(hidden), norm, rows(normal)});
}

void adapter_norm_backward(const BottleneckBackward& adapter, const Norm& norm, const Matrix& normal,
                           const Matrix& dsum, const Matrix& dweight, const Matrix& dbias) {
  py::gil_scoped_release release;
  kernels().adapter_norm_backward({adapter, norm, rows(normal), rows(dsum), rows(dweight), rows(dbias)});
}

void norm_adapter_forward(const BottleneckForward& adapter, const Norm& norm) {
  py::gil_scoped_release release;
  kernels().norm_adapter_forward({adapter, norm});
}

void norm_adapter_backward(const BottleneckBackward& adapter, const Norm& norm, const Matrix& dweight,
                           const Matrix& dbias) {
  py::gil_scoped_release release;
  kernels().norm_adapter_backward({adapter, norm, rows(dweight), rows(dbias)});
}

// Rows in the order of petl_kernels.ops._channel_step.FIELDS.
std::vector<ChannelTensor> channel_tensors(const py::buffer& buffer, int64_t count) {
  constexpr int64_t kFields = 14;
  const int64_t* row = table<int64_t>(buffer, count, kFields);
  const auto pointer = [&](int64_t field) { return reinterpret_cast<void*>(static_cast<uintptr_t>(row[field])); };
  std::vector<ChannelTensor> tensors;
  for (int64_t i = 0; i < count; ++i, row += kFields) {
    tensors.push_back({pointer(0), pointer(1), {pointer(2), pointer(3)}, static_cast<float*>(pointer(4)),
                       static_cast<const int64_t*>(pointer(5)), static_cast<DType>(row[6]),
                       static_cast<Selection>(row[7]), row[8], row[9], row[10], row[11], row[12], row[13]});
  }
  return tensors;
}

template <typename Options>
void channel_step(void (*kernel)(const ChannelStep<Options>&), const py::buffer& rows,
                  const std::vector<Options>& options, uintptr_t grad_scale, uintptr_t found_inf, int threads) {
  const auto count = static_cast<int64_t>(options.size());
  const std::vector<ChannelTensor> tensors = channel_tensors(rows, count);
  const auto* scale = reinterpret_cast<const float*>(grad_scale);
  const auto* inf = reinterpret_cast<const float*>(found_inf);
  py::gil_scoped_release release;
  kernel({tensors.data(), options.data(), count, scale, inf, threads});
}

void channel_adamw(int64_t count, const py::buffer& rows, const py::buffer& numbers, uintptr_t grad_scale,
                   uintptr_t found_inf, int threads) {
  std::vector<AdamWOptions> options;
  const double* n = table<double>(numbers, count, 6);
  for (int64_t i = 0; i < count; ++i, n += 6) options.push_back({n[0], n[1], n[2], n[3], n[4], n[5] != 0});
  channel_step(kernels().channel_adamw, rows, options, grad_scale, found_inf, threads);
}

void channel_sgd(int64_t count, const py::buffer& rows, const py::buffer& numbers, uintptr_t grad_scale,
                 uintptr_t found_inf, int threads) {
  std::vector<SGDOptions> options;
  const double* n = table<double>(numbers, count, 6);
  for (int64_t i = 0; i < count; ++i, n += 6) options.push_back({n[0], n[1], n[2], n[3], n[4] != 0, n[5] != 0});
  channel_step(kernels().channel_sgd, rows, options, grad_scale, found_inf, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of petl_kernels";
  m.def("adapter_bank_forward", &adapter_bank_forward);
  m.def("adapter_bank_backward", &adapter_bank_backward);
  m.def("bottleneck_forward", &bottleneck_forward);
  m.def("bottleneck_backward", &bottleneck_backward);
  m.def("channel_gradient", &channel_gradient);
  m.def("channel_adapter_forward", &channel_adapter_forward);
  m.def("channel_adapter_backward", &channel_adapter_backward);
  m.def("channel_importance", &channel_importance);
  m.def("channel_scale_forward", &channel_scale_forward);
  m.def("channel_scale_backward", &channel_scale_backward);
  m.def("layer_norm_forward", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_backward);
  bind_adapter(m);
  m.def("adapter_norm_forward", &adapter_norm_forward);
  m.def("adapter_norm_backward", &adapter_norm_backward);
  m.def("norm_adapter_forward", &norm_adapter_forward);
  m.def("norm_adapter_backward", &norm_adapter_backward);
  m.def("channel_adamw", &channel_adamw);
  m.def("channel_sgd", &channel_sgd);
  m.def("built_isas", &built_isas, "The instruction sets this binary holds kernels for, narrowest first.");
  m.def("isas", &isas, "Those of them that this processor can run.");
  m.def("isa", [] { return kernels().isa; }, "The one in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another one; for measurements and tests.");
}
