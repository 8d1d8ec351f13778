// The activations and their derivatives on vectors. Polynomials were fitted for float (largest error of each in
// its comment); double goes through the C library, element by element.
#pragma once

#include <cmath>

#include "../petl.h"
#include "simd.h"

namespace petl::PETL_ISA {

template <typename F>
PETL_INLINE Vec<double> each(Vec<double> x, F f) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
  return x;
}

template <int kDegree>
PETL_INLINE Vec<float> polynomial(Vec<float> x, const float (&c)[kDegree + 1]) {
  Vec<float> value = splat(c[kDegree]);
  for (int i = kDegree - 1; i >= 0; --i) value = value * x + c[i];
  return value;
}

PETL_INLINE Vec<float> magnitude(Vec<float> x) { return bit_cast<Vec<float>>(bit_cast<Bits>(x) & 0x7fffffffu); }
PETL_INLINE Vec<float> with_sign_of(Vec<float> value, Vec<float> x) {
  return bit_cast<Vec<float>>(bit_cast<Bits>(value) | (bit_cast<Bits>(x) & 0x80000000u));
}

// exp: 2^n * p(x - n ln 2), relative error 9e-8; 0 below -87.33, infinity above 88.72, NaN stays.
PETL_INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> low = splat(-87.33f), high = splat(88.72f);
  Vec<float> clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  const Vec<float> shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec<float> rounded = clamped * 1.44269504f + shift;
  const Vec<float> n = rounded - shift;
  const Vec<float> rest = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  const float c[] = {1.0f,           1.000000036e+00f, 4.999999208e-01f, 1.666642015e-01f,
                     4.166822576e-02f, 8.374817308e-03f, 1.383683998e-03f};
  // 2^n in two halves, because n = 128 has no float of its own.
  const Vec<int32_t> exponent = bit_cast<Vec<int32_t>>(rounded) - bit_cast<Vec<int32_t>>(shift);
  const Vec<int32_t> half = exponent >> 1;
  const Vec<float> a = bit_cast<Vec<float>>((half + 127) << 23);
  const Vec<float> b = bit_cast<Vec<float>>((exponent - half + 127) << 23);
  const Vec<float> value = polynomial<6>(rest, c) * a * b;
  const Vec<float> small = x < low ? Vec<float>{} : value;
  return x > high ? splat(__builtin_inff()) : small;
}
PETL_INLINE Vec<double> exp(Vec<double> x) {
  return each(x, [](double v) { return std::exp(v); });
}

// The normal distribution and what its density is made of: cdf = Phi(z), bell = exp(-z^2 / 2). Up to |z| = 1 the cdf is
// 1/2 and an odd polynomial (1e-10); beyond, bell times a polynomial in (|z| - a) / (|z| + a), of a relative error of 8e-8,
// so that what gelu leaves of a negative z is as accurate as that of a positive one, which 1 + erf is not.
PETL_INLINE void normal(Vec<float> z, Vec<float>& cdf, Vec<float>& bell) {
  const float inner[] = {3.989422787e-01f,  -6.649033234e-02f, 9.973170911e-03f,
                         -1.185984639e-03f, 1.131435691e-04f,  -7.530271107e-06f};
  const float outer[] = {1.413313238e-01f,  -2.280696464e-01f, 1.131365002e-01f, -2.455456788e-02f,
                         -5.130710215e-03f, 3.007201383e-03f,  8.052409386e-04f, -5.238507684e-04f};
  const float a = 2.5f;
  const Vec<float> square = z * z, distance = magnitude(z), size = distance > 16.0f ? splat(16.0f) : distance;
  bell = exp(-0.5f * square);
  const Vec<float> tail = bell * polynomial<7>((size - a) / (size + a), outer);
  const Vec<float> far = z < 0.0f ? tail : 1.0f - tail;  // NaN takes it too, and bell keeps it
  cdf = distance <= 1.0f ? 0.5f + z * polynomial<5>(square, inner) : far;
}
PETL_INLINE void normal(Vec<double> z, Vec<double>& cdf, Vec<double>& bell) {
  cdf = each(z, [](double v) { return 0.5 * std::erfc(-0.7071067811865475244 * v); });
  bell = exp(-0.5 * z * z);
}

// tanh: odd polynomial below 0.63 (1e-7 relative), 1 - 2 / (1 + e^2|x|) beyond.
PETL_INLINE Vec<float> tanh(Vec<float> x) {
  const float inner[] = {1.0f, -3.333325545e-01f, 1.333099684e-01f, -5.370983627e-02f, 2.055281587e-02f, -5.615599221e-03f};
  const Vec<float> size = magnitude(x);
  const Vec<float> near = x * polynomial<5>(x * x, inner);
  const Vec<float> far = with_sign_of(1.0f - 2.0f / (1.0f + exp(size + size)), x);
  return size < 0.63f ? near : far;
}
PETL_INLINE Vec<double> tanh(Vec<double> x) {
  return each(x, [](double v) { return std::tanh(v); });
}

template <typename V>
PETL_INLINE V sigmoid(V z) {
  return 1 / (1 + exp(-z));
}

// value = act(z) and slope = act'(z). `>` and `<` are arranged so that NaN comes out as NaN. Of a softmax, which is a
// matter of rows (bottleneck_rows.h), z is the value already, and the slope what its gradient is multiplied by.
template <Activation kActivation, typename C>
PETL_INLINE void activate(Vec<C> z, Vec<C>& value, Vec<C>& slope) {
  const Vec<C> zero = {}, one = splat(C(1));
  if constexpr (kActivation == Activation::kIdentity) {
    value = z, slope = one;
  } else if constexpr (kActivation == Activation::kSoftmax) {
    value = z, slope = z;
  } else if constexpr (kActivation == Activation::kRelu) {
    value = z < zero ? zero : z, slope = z <= zero ? zero : one;
  } else if constexpr (kActivation == Activation::kLeakyRelu) {
    value = z > zero ? z : z * C(0.01), slope = z > zero ? one : splat(C(0.01));
  } else if constexpr (kActivation == Activation::kSigmoid) {
    value = sigmoid(z), slope = value * (one - value);
  } else if constexpr (kActivation == Activation::kTanh) {
    value = tanh(z), slope = one - value * value;
  } else if constexpr (kActivation == Activation::kSilu) {
    const Vec<C> gate = sigmoid(z);
    value = z * gate, slope = gate * (one + z * (one - gate));
  } else if constexpr (kActivation == Activation::kGelu) {
    Vec<C> cdf, bell;
    normal(z, cdf, bell);
    value = z * cdf, slope = cdf + z * C(0.3989422804014326779) * bell;
  } else {
    static_assert(kActivation == Activation::kGeluTanh);
    const C outer = C(0.7978845608028653559), inner = C(0.044715);
    const Vec<C> square = z * z, t = tanh(outer * (z + inner * square * z));
    value = C(0.5) * z * (one + t);
    slope = C(0.5) * (one + t) + C(0.5) * z * (one - t * t) * outer * (one + 3 * inner * square);
  }
}

}  // namespace petl::PETL_ISA
