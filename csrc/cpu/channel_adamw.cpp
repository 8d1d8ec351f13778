// AdamW on chosen channels: torch.optim.AdamW's formulas in its order of operations. Compiled once per instruction set.
#include <cmath>

#include "channel_step.h"

namespace petl::PETL_ISA {
namespace {

// What of a tensor's step does not depend on the element; as in torch, computed in double and then rounded.
struct Constants {
  double decay, weight1, beta2, weight2, step_size, correction2, eps, scale;
};

Constants constants(const AdamWOptions& o, double step, const float* grad_scale) {
  const double correction1 = 1 - std::pow(o.beta1, step), correction2 = 1 - std::pow(o.beta2, step);
  const double scale = grad_scale ? static_cast<double>(*grad_scale) : 1.0;
  return {1 - o.lr * o.weight_decay, 1 - o.beta1, o.beta2, 1 - o.beta2, o.lr / correction1, std::sqrt(correction2), o.eps,
          o.maximize ? -scale : scale};
}

template <typename C, bool kScaled>
struct Update {
  C decay, weight1, beta2, weight2, step_size, correction2, eps, scale;

  explicit Update(const Constants& c)
      : decay(static_cast<C>(c.decay)),
        weight1(static_cast<C>(c.weight1)),
        beta2(static_cast<C>(c.beta2)),
        weight2(static_cast<C>(c.weight2)),
        step_size(static_cast<C>(c.step_size)),
        correction2(static_cast<C>(c.correction2)),
        eps(static_cast<C>(c.eps)),
        scale(static_cast<C>(c.scale)) {}

  PETL_INLINE void operator()(Vec<C>& p, Vec<C> g, Vec<C>* states) const {
    Vec<C>&m = states[0], &v = states[1];
    if constexpr (kScaled) g = g / scale;
    p = p * decay;
    // torch.lerp, which is exact at both ends.
    m = weight1 < C(0.5) ? m + weight1 * (g - m) : g - (g - m) * (C(1) - weight1);
    v = v * beta2 + weight2 * g * g;
    p = p - step_size * m / (square_root(v) / correction2 + eps);
  }
};

template <typename C>
void update_tensor(const ChannelTensor& t, const Constants& c, int64_t begin, int64_t end) {
  if (c.scale == 1) return update_part<C, 2>(t, begin, end, Update<C, false>(c));
  update_part<C, 2>(t, begin, end, Update<C, true>(c));
}

}  // namespace

void channel_adamw(const ChannelStep<AdamWOptions>& call) {
  if (call.found_inf && *call.found_inf != 0) return;
  std::vector<Constants> all;
  for (int64_t i = 0; i < call.count; ++i) {
    all.push_back(constants(call.options[i], static_cast<double>(*call.tensors[i].step + 1), call.grad_scale));
  }
  share_elements(call.tensors, call.count, call.threads, [&](int64_t i, int64_t begin, int64_t end) {
    const ChannelTensor& t = call.tensors[i];
    if (t.dtype == DType::kFloat64) return update_tensor<double>(t, all[i], begin, end);
    update_tensor<float>(t, all[i], begin, end);
  });
  for (int64_t i = 0; i < call.count; ++i) *call.tensors[i].step += 1;
}

}  // namespace petl::PETL_ISA
