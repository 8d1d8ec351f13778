// petl_kernels._cuda: the CUDA kernels for Python. Addresses, sizes and a stream come in, nothing of torch; the caller
// holds the tensors, and what is launched here runs on in the stream after the return.
#include "../cuda/kernels.h"
#include "adapter.h"

namespace {

using Where = std::tuple<int, uintptr_t, int, int64_t, bool>;  // petl_kernels.ops._cuda.launch_on

cuda::Launch launch(const Where& where) {
  const auto [device, stream, processors, shared_bytes, fast] = where;
  return {device, reinterpret_cast<void*>(stream), processors, shared_bytes, fast};
}

// `allocate(bytes)` returns the address of workspace that outlives what is launched.
void* workspace(const py::object& allocate, int64_t bytes) {
  return reinterpret_cast<void*>(bytes ? allocate(bytes).cast<uintptr_t>() : 0);
}

Dropout dropout(uintptr_t seed, double p) { return {reinterpret_cast<const int64_t*>(seed), p}; }

template <void (*kForward)(const BottleneckForward&, const cuda::Launch&)>
void bottleneck_forward(const Where& where, std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, const Matrix& x,
                        const Matrix& w_down, const Matrix& b_down, const Matrix& w_up, const Matrix& b_up,
                        const Matrix& residual, const Matrix& scale, const Matrix& gate, int64_t scale_size, uintptr_t seed,
                        double p, double alpha, int activation, const Matrix& y, const Matrix& z) {
  const auto [n, d_in, r, d_out] = sizes;
  kForward({n, d_in, r, d_out, rows(x), rows(w_down), rows(b_down), rows(w_up), rows(b_up), rows(residual), rows(scale),
            rows(gate), scale_size, dropout(seed, p), alpha, static_cast<Activation>(activation), rows(y), rows(z), 0},
           launch(where));
}

template <int64_t (*kWorkspace)(const BottleneckBackward&, const cuda::Launch&),
          void (*kBackward)(const BottleneckBackward&, const cuda::Launch&, void*)>
void bottleneck_backward(const Where& where, std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, const Matrix& g,
                         const Matrix& x, const Matrix& z, const Matrix& w_down, const Matrix& w_up, const Matrix& b_up,
                         const Matrix& scale, const Matrix& gate, int64_t scale_size, uintptr_t seed, double p, double alpha,
                         int activation, bool add_g, const Matrix& dx, const Matrix& dw_down, const Matrix& db_down,
                         const Matrix& dw_up, const Matrix& db_up, const Matrix& dscale, const Matrix& dgate,
                         const py::object& allocate) {
  const auto [n, d_in, r, d_out] = sizes;
  const BottleneckBackward call{n, d_in, r, d_out, rows(g), rows(x), rows(z), rows(w_down), rows(w_up), rows(b_up),
                                rows(scale), rows(gate), scale_size, dropout(seed, p), alpha,
                                static_cast<Activation>(activation), add_g, rows(dx), rows(dw_down), rows(db_down),
                                rows(dw_up), rows(db_up), rows(dscale), rows(dgate), 0};
  const cuda::Launch on = launch(where);
  kBackward(call, on, workspace(allocate, kWorkspace(call, on)));
}

void adapter_norm_forward(const Where& where, const BottleneckForward& adapter, const Matrix& hidden, const Norm& norm,
                          const Matrix& normal, const py::object& allocate) {
  const AdapterNormForward call{adapter, rows(hidden), norm, rows(normal)};
  const cuda::Launch on = launch(where);
  cuda::adapter_norm_forward(call, on, workspace(allocate, cuda::adapter_norm_forward_workspace(call, on)));
}
void adapter_norm_backward(const Where& where, const BottleneckBackward& adapter, const Norm& norm, const Matrix& normal,
                           const Matrix& dsum, const Matrix& dweight, const Matrix& dbias, const py::object& allocate) {
  const AdapterNormBackward call{adapter, norm, rows(normal), rows(dsum), rows(dweight), rows(dbias)};
  const cuda::Launch on = launch(where);
  cuda::adapter_norm_backward(call, on, workspace(allocate, cuda::adapter_norm_workspace(call, on)));
}
void norm_adapter_forward(const Where& where, const BottleneckForward& adapter, const Norm& norm, const py::object& allocate) {
  const NormAdapterForward call{adapter, norm};
  const cuda::Launch on = launch(where);
  cuda::norm_adapter_forward(call, on, workspace(allocate, cuda::norm_adapter_forward_workspace(call, on)));
}
void norm_adapter_backward(const Where& where, const BottleneckBackward& adapter, const Norm& norm, const Matrix& dweight,
                           const Matrix& dbias, const py::object& allocate) {
  const NormAdapterBackward call{adapter, norm, rows(dweight), rows(dbias)};
  const cuda::Launch on = launch(where);
  cuda::norm_adapter_backward(call, on, workspace(allocate, cuda::norm_adapter_workspace(call, on)));
}

void channel_adapter_forward(const Where& where, std::tuple<int64_t, int64_t, int64_t> sizes, uintptr_t channels,
                             const Matrix& x, const Matrix& weight, const Matrix& bias, const Matrix& scale, double alpha,
                             bool scale_input, const Matrix& y, const Matrix& x_channels) {
  const auto [n, d, k] = sizes;
  cuda::channel_adapter_forward({n, d, k, reinterpret_cast<const int64_t*>(channels), rows(x), rows(weight), rows(bias),
                                 rows(scale), alpha, scale_input, rows(y), rows(x_channels), 0},
                                launch(where));
}

void channel_adapter_backward(const Where& where, std::tuple<int64_t, int64_t, int64_t> sizes, uintptr_t channels,
                              const Matrix& g, const Matrix& x_channels, const Matrix& weight, const Matrix& bias,
                              const Matrix& scale, double alpha, bool scale_input, const Matrix& dx,
                              const Matrix& dweight, const Matrix& dbias, const Matrix& dscale,
                              const py::object& allocate) {
  const auto [n, d, k] = sizes;
  const ChannelAdapterBackward call{n, d, k, reinterpret_cast<const int64_t*>(channels), rows(g), rows(x_channels),
                                    rows(weight), rows(bias), rows(scale), alpha, scale_input, rows(dx), rows(dweight),
                                    rows(dbias), rows(dscale), 0};
  const cuda::Launch on = launch(where);
  cuda::channel_adapter_backward(call, on, workspace(allocate, cuda::channel_adapter_workspace(call, on)));
}

void channel_gradient(const Where& where, std::tuple<int64_t, int64_t, int64_t> sizes, const Matrix& picked,
                      uintptr_t channels, const Matrix& dense, bool transposed, const Matrix& dw, const Matrix& db,
                      const py::object& allocate) {
  const auto [n, k, d] = sizes;
  const ChannelGradient call{n,          k,        d,        rows(picked), reinterpret_cast<const int64_t*>(channels),
                             rows(dense), transposed, rows(dw), rows(db),   0};
  const cuda::Launch on = launch(where);
  cuda::channel_gradient(call, on, workspace(allocate, cuda::channel_gradient_workspace(call, on)));
}

void channel_importance(const Where& where, std::tuple<int64_t, int64_t, int64_t> sizes, const Matrix& activation,
                        const Matrix& grad, int reduction, const Matrix& scores, const py::object& allocate) {
  const auto [n, d, sample_rows] = sizes;
  const ChannelImportance call{n, d, sample_rows, rows(activation), rows(grad), static_cast<Reduction>(reduction),
                               rows(scores), 0};
  const cuda::Launch on = launch(where);
  cuda::channel_importance(call, on, workspace(allocate, cuda::channel_importance_workspace(call, on)));
}

// Addresses on the device, of what `petl_kernels.ops._channel_step_device.DeviceTable` holds.
cuda::DeviceStep device_step(uintptr_t rows, uintptr_t numbers, uintptr_t programs, int64_t count, uintptr_t grad_scale,
                             uintptr_t found_inf) {
  return {reinterpret_cast<const int64_t*>(rows),      reinterpret_cast<const double*>(numbers),
          reinterpret_cast<const int64_t*>(programs),  count,
          reinterpret_cast<const float*>(grad_scale), reinterpret_cast<const float*>(found_inf)};
}

template <void (*kStep)(const cuda::DeviceStep&, const cuda::Launch&)>
void channel_step(const Where& where, uintptr_t rows, uintptr_t numbers, uintptr_t programs, int64_t count,
                  uintptr_t grad_scale, uintptr_t found_inf) {
  kStep(device_step(rows, numbers, programs, count, grad_scale, found_inf), launch(where));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of petl_kernels";
  m.def("bottleneck_forward", &bottleneck_forward<cuda::bottleneck_forward>);
  m.def("bottleneck_backward", &bottleneck_backward<cuda::bottleneck_workspace, cuda::bottleneck_backward>);
#ifdef PETL_SM90
  m.def("bottleneck_forward_sm90", &bottleneck_forward<cuda::bottleneck_forward_sm90>);
  m.def("bottleneck_backward_sm90", &bottleneck_backward<cuda::bottleneck_workspace_sm90, cuda::bottleneck_backward_sm90>);
#endif
  bind_adapter(m);
  m.def("adapter_norm_forward", &adapter_norm_forward);
  m.def("adapter_norm_backward", &adapter_norm_backward);
  m.def("norm_adapter_forward", &norm_adapter_forward);
  m.def("norm_adapter_backward", &norm_adapter_backward);
  m.def("channel_adapter_forward", &channel_adapter_forward);
  m.def("channel_adapter_backward", &channel_adapter_backward);
  m.def("channel_gradient", &channel_gradient);
  m.def("channel_importance", &channel_importance);
  m.def("channel_adamw", &channel_step<cuda::channel_adamw>);
  m.def("channel_sgd", &channel_step<cuda::channel_sgd>);
}
