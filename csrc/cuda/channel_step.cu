// AdamW and SGD on chosen channels of many tensors, in one launch: a block updates 1024 elements of one tensor, which it
// finds in a table. Elements are taken in the order of the compact state, so that neighbours in a warp are neighbours in
// memory but for columns that are not. The formulas, and their order of operations, are torch.optim's.
#include "kernels.h"
#include "tiles.h"

namespace petl::cuda {
namespace {

constexpr int kElements = 4;  // of a thread; petl_kernels.ops._channel_step_device.BLOCK of a block
constexpr int kFields = 14, kNumbers = 6;

// A row of the table.
struct Tensor {
  void *param, *states[2];
  const void* grad;
  const float* step;
  const int64_t* channels;
  DType dtype;
  Selection selection;
  int64_t rows, cols, param_row, param_col, grad_row, grad_col;
};
PETL_DEVICE Tensor tensor_of(const int64_t* row) {
  const auto pointer = [&](int field) { return reinterpret_cast<void*>(static_cast<uintptr_t>(row[field])); };
  return {pointer(0), {pointer(2), pointer(3)}, pointer(1), static_cast<const float*>(pointer(4)),
          static_cast<const int64_t*>(pointer(5)), static_cast<DType>(row[6]), static_cast<Selection>(row[7]),
          row[8], row[9], row[10], row[11], row[12], row[13]};
}

// What of a tensor's step does not depend on the element: computed once per block, in double, and then rounded.
struct AdamW {
  float decay, eps, step_size, root2, weight1, weight2, beta2;

  static PETL_DEVICE AdamW of(const double* numbers, const float* step) {
    const double lr = numbers[0], beta1 = numbers[1], beta2 = numbers[2];
    // Of 0 there is no logarithm.
    const double log1 = log(beta1 > 1e-300 ? beta1 : 1e-300), log2 = log(beta2 > 1e-300 ? beta2 : 1e-300);
    const double correction1 = 1 - exp(*step * log1), correction2 = 1 - exp(*step * log2);
    return {static_cast<float>(1 - lr * numbers[4]), static_cast<float>(numbers[3]), static_cast<float>(lr / correction1),
            static_cast<float>(sqrt(correction2)),   static_cast<float>(1 - beta1),  static_cast<float>(1 - beta2),
            static_cast<float>(beta2)};
  }
  PETL_DEVICE float update(float p, float g, const Tensor& t, int64_t element) const {
    float m = load_float(t.states[0], t.dtype, element), v = load_float(t.states[1], t.dtype, element);
    p *= decay;
    m = weight1 < 0.5f ? m + weight1 * (g - m) : g - (g - m) * (1.0f - weight1);  // torch.lerp
    v = v * beta2 + weight2 * g * g;
    store_float(t.states[0], t.dtype, element, m);
    store_float(t.states[1], t.dtype, element, v);
    return p - step_size * m / (sqrtf(v) / root2 + eps);
  }
};

struct SGD {
  float lr, momentum, weight, weight_decay;
  bool nesterov, first;

  static PETL_DEVICE SGD of(const double* numbers, const float* step) {
    return {static_cast<float>(numbers[0]), static_cast<float>(numbers[1]), static_cast<float>(1 - numbers[2]),
            static_cast<float>(numbers[3]), numbers[4] != 0, step && *step == 1};
  }
  PETL_DEVICE float update(float p, float g, const Tensor& t, int64_t element) const {
    if (weight_decay != 0) g += weight_decay * p;
    if (t.states[0]) {
      const float held = load_float(t.states[0], t.dtype, element);
      const float buffer = first ? g : momentum * held + weight * g;  // the first gradient is not dampened
      store_float(t.states[0], t.dtype, element, buffer);
      g = nesterov ? g + momentum * buffer : buffer;
    }
    return p - lr * g;
  }
};

template <typename Rule>
__global__ void __launch_bounds__(kThreads) channel_step_kernel(const __grid_constant__ DeviceStep call) {
  if (call.found_inf && *call.found_inf != 0) return;
  const int64_t which = call.programs[2 * blockIdx.x], first_block = call.programs[2 * blockIdx.x + 1];
  const Tensor t = tensor_of(call.rows + which * kFields);
  const double* const numbers = call.numbers + which * kNumbers;
  Rule* const rule = reinterpret_cast<Rule*>(shared_memory());
  if (threadIdx.x == 0) *rule = Rule::of(numbers, t.step);
  sync_block();
  const Rule r = *rule;
  const float scale = (numbers[5] != 0 ? -1.0f : 1.0f) * (call.grad_scale ? *call.grad_scale : 1.0f);
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - first_block) * (kThreads * kElements);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int64_t element = begin + i * kThreads + threadIdx.x;
    if (element >= t.rows * t.cols) break;
    int64_t row = t.rows == 1 ? 0 : element / t.cols, col = element - row * t.cols;
    if (t.selection == Selection::kRows) row = t.channels[row];
    if (t.selection == Selection::kColumns) col = t.channels[col];
    const int64_t at = row * t.param_row + col * t.param_col;
    const float g = load_float(t.grad, t.dtype, row * t.grad_row + col * t.grad_col) / scale;
    store_float(t.param, t.dtype, at, r.update(load_float(t.param, t.dtype, at), g, t, element));
  }
}

template <typename Rule>
void step(const DeviceStep& call, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  petl::cuda::launch(channel_step_kernel<Rule>, dim3(static_cast<unsigned>(call.count)), kThreads,
                     static_cast<int64_t>(sizeof(Rule)), launch.stream, call);
}

}  // namespace

void channel_adamw(const DeviceStep& call, const Launch& launch) { step<AdamW>(call, launch); }
void channel_sgd(const DeviceStep& call, const Launch& launch) { step<SGD>(call, launch); }

}  // namespace petl::cuda
