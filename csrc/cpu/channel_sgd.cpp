// SGD on chosen channels: torch.optim.SGD's formulas in its order of operations. Compiled once per instruction set.
#include "channel_step.h"

namespace petl::PETL_ISA {
namespace {

template <typename C>
struct Update {
  C lr, momentum, weight, weight_decay, scale;
  bool first, nesterov;

  Update(const SGDOptions& o, const float* step, const float* grad_scale)
      : lr(static_cast<C>(o.lr)),
        momentum(static_cast<C>(o.momentum)),
        weight(static_cast<C>(1 - o.dampening)),
        weight_decay(static_cast<C>(o.weight_decay)),
        scale(static_cast<C>(grad_scale ? *grad_scale : 1.0f)),
        first(step && *step == 0),
        nesterov(o.nesterov) {
    if (o.maximize) scale = -scale;
  }

  PETL_INLINE Vec<C> gradient(Vec<C> p, Vec<C> g) const {
    if (scale != C(1)) g = g / scale;
    return weight_decay != C(0) ? g + weight_decay * p : g;
  }
};

template <typename C>
struct Plain : Update<C> {
  PETL_INLINE void operator()(Vec<C>& p, Vec<C> g, Vec<C>*) const { p = p - this->lr * this->gradient(p, g); }
};

template <typename C>
struct Momentum : Update<C> {
  PETL_INLINE void operator()(Vec<C>& p, Vec<C> g, Vec<C>* states) const {
    Vec<C>& buffer = states[0];
    g = this->gradient(p, g);
    buffer = this->first ? g : buffer * this->momentum + this->weight * g;  // the first gradient is not dampened
    p = p - this->lr * (this->nesterov ? g + this->momentum * buffer : buffer);
  }
};

template <typename C>
void update_tensor(const ChannelTensor& t, const Update<C>& update, int64_t begin, int64_t end) {
  if (t.states[0]) return update_part<C, 1>(t, begin, end, Momentum<C>{update});
  update_part<C, 0>(t, begin, end, Plain<C>{update});
}

}  // namespace

void channel_sgd(const ChannelStep<SGDOptions>& call) {
  if (call.found_inf && *call.found_inf != 0) return;
  share_elements(call.tensors, call.count, call.threads, [&](int64_t i, int64_t begin, int64_t end) {
    const ChannelTensor& t = call.tensors[i];
    const SGDOptions& o = call.options[i];
    if (t.dtype == DType::kFloat64) return update_tensor<double>(t, {o, t.step, call.grad_scale}, begin, end);
    update_tensor<float>(t, {o, t.step, call.grad_scale}, begin, end);
  });
  for (int64_t i = 0; i < call.count; ++i) {
    if (call.tensors[i].step) *call.tensors[i].step += 1;
  }
}

}  // namespace petl::PETL_ISA
