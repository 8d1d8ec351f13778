// What happens between the two projections, to a block of rows [rows, r] in L1: activation or softmax, dropout, gate,
// and the derivative of all that; and the scale of what comes out.
#pragma once

#include "activation.h"
#include "dropout.h"

namespace petl::PETL_ISA {

// scales[c] = alpha * scale[c], for every output channel.
template <typename C>
void fill_scales(const Rows& scale, int64_t size, double alpha, int64_t d_out, C* scales) {
  if (scale) widen<C>(scale, 0, 1, size, scales, size);
  for (int64_t c = d_out - 1; c >= 0; --c) scales[c] = static_cast<C>(alpha) * (scale ? scales[size == 1 ? 0 : c] : C(1));
}

// The rest of what a block of rows goes through: `factors` of dropout, in rows like those of h, and the gate of each
// row. Either may be null.
template <typename C>
struct Modifiers {
  const C *factors = nullptr, *gate = nullptr;

  explicit operator bool() const { return factors || gate; }
};

template <typename C>
PETL_INLINE Vec<C> first_lanes(Vec<C> v, int64_t count, C rest) {
  for (int64_t j = count; j < kLanes<C>; ++j) v[j] = rest;
  return v;
}

// z becomes its softmax, over the r elements of each row.
template <typename C>
void softmax_rows(C* z, int64_t rows, int64_t ld, int64_t r) {
  const C infinity = static_cast<C>(__builtin_inf());
  for (int64_t i = 0; i < rows; ++i) {
    C* row = z + i * ld;
    Vec<C> tops = splat(-infinity), sums = {};
    for (int64_t k = 0; k < r; k += kLanes<C>) {
      const Vec<C> v = first_lanes<C>(load_raw<Vec<C>>(row + k), r - k, -infinity);
      tops = v > tops ? v : tops;  // a NaN is passed over here, and spoils the sum
    }
    C top = tops[0];
    for (int j = 1; j < kLanes<C>; ++j) top = tops[j] > top ? tops[j] : top;
    for (int64_t k = 0; k < r; k += kLanes<C>) {
      const Vec<C> e = first_lanes<C>(exp(load_raw<Vec<C>>(row + k) - top), r - k, C(0));
      Storage<C, C>::store(row + k, e);
      sums += e;
    }
    const C scale = 1 / sum_lanes<C>(sums);
    for (int64_t k = 0; k < r; k += kLanes<C>) Storage<C, C>::store(row + k, load_raw<Vec<C>>(row + k) * scale);
  }
}

// h = gate drop(act(z)), in place.
template <typename C, Activation kActivation, bool kModified>
void activate_rows(C* z, int64_t rows, int64_t ld, int64_t r, const Modifiers<C>& m) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < r; k += kLanes<C>) {
      Vec<C> value, slope;
      activate<kActivation, C>(load_raw<Vec<C>>(z + i * ld + k), value, slope);
      if (kModified && m.factors) value = kept<C>(value, load_raw<Vec<C>>(m.factors + i * ld + k));
      if (kModified && m.gate) value *= m.gate[i];
      Storage<C, C>::store(z + i * ld + k, value);
    }
  }
}

// h = gate drop(act(z)) and dz = gate drop'(dh) act'(z), where dh is the gradient of what the gate multiplies; z arrives
// in h and dh in dz. dgate, unless null, is increased by drop(act(z)) . dh.
template <typename C, Activation kActivation, bool kModified>
void differentiate_rows(C* h, C* dz, int64_t rows, int64_t ld, int64_t r, const Modifiers<C>& m, C* dgate) {
  for (int64_t i = 0; i < rows; ++i) {
    C *h_row = h + i * ld, *dz_row = dz + i * ld;
    const auto gradient = [&](int64_t k) {
      const Vec<C> dh = load_raw<Vec<C>>(dz_row + k);
      return kModified && m.factors ? kept<C>(dh, load_raw<Vec<C>>(m.factors + i * ld + k)) : dh;
    };
    C mean = 0;  // of a softmax: what the normalisation takes off dh, its mean under h
    if constexpr (kActivation == Activation::kSoftmax) {
      Vec<C> sums = {};
      for (int64_t k = 0; k < r; k += kLanes<C>) {
        sums += first_lanes<C>(load_raw<Vec<C>>(h_row + k) * gradient(k), r - k, C(0));
      }
      mean = sum_lanes<C>(sums);
    }
    Vec<C> sums = {};
    for (int64_t k = 0; k < r; k += kLanes<C>) {
      Vec<C> value, slope, dh = gradient(k);
      activate<kActivation, C>(load_raw<Vec<C>>(h_row + k), value, slope);
      if (kModified && dgate) sums += first_lanes<C>(value * dh, r - k, C(0));
      if (kActivation == Activation::kSoftmax) dh -= mean;
      if (kModified && m.factors) value = kept<C>(value, load_raw<Vec<C>>(m.factors + i * ld + k));
      if (kModified && m.gate) value *= m.gate[i], slope *= m.gate[i];
      Storage<C, C>::store(h_row + k, value);
      Storage<C, C>::store(dz_row + k, dh * slope);
    }
    if (kModified && dgate) dgate[i] += sum_lanes<C>(sums);
  }
}

template <typename F>
void with_activation(Activation activation, F f) {
  switch (activation) {
#define PETL_CASE(name) \
  case Activation::name: \
    return f(std::integral_constant<Activation, Activation::name>{});
    PETL_CASE(kRelu)
    PETL_CASE(kGelu)
    PETL_CASE(kGeluTanh)
    PETL_CASE(kSilu)
    PETL_CASE(kTanh)
    PETL_CASE(kSigmoid)
    PETL_CASE(kLeakyRelu)
    PETL_CASE(kIdentity)
    PETL_CASE(kSoftmax)
#undef PETL_CASE
  }
}

// The two walks above for an activation known at run time. Without modifiers they have code of their own.
template <typename C>
void activate_rows(Activation activation, C* z, int64_t rows, int64_t ld, int64_t r, const Modifiers<C>& m = {}) {
  with_activation(activation, [&](auto a) {
    if (m) return activate_rows<C, decltype(a)::value, true>(z, rows, ld, r, m);
    activate_rows<C, decltype(a)::value, false>(z, rows, ld, r, m);
  });
}
template <typename C>
void differentiate_rows(Activation activation, C* h, C* dz, int64_t rows, int64_t ld, int64_t r,
                        const Modifiers<C>& m = {}, C* dgate = nullptr) {
  with_activation(activation, [&](auto a) {
    if (m) return differentiate_rows<C, decltype(a)::value, true>(h, dz, rows, ld, r, m, dgate);
    differentiate_rows<C, decltype(a)::value, false>(h, dz, rows, ld, r, m, dgate);
  });
}

}  // namespace petl::PETL_ISA
