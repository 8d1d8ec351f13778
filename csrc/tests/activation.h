// The activations of one element and their derivatives, in double.
#pragma once

#include "testing.h"

inline double act(Activation a, double z) {
  switch (a) {
    case Activation::kRelu: return z > 0 ? z : 0;
    case Activation::kGelu: return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0)));
    case Activation::kGeluTanh: return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::kSilu: return z / (1 + std::exp(-z));
    case Activation::kTanh: return std::tanh(z);
    case Activation::kSigmoid: return 1 / (1 + std::exp(-z));
    case Activation::kLeakyRelu: return z > 0 ? z : 0.01 * z;
    case Activation::kIdentity: return z;
    case Activation::kSoftmax: break;  // of a row
  }
  return NAN;
}

inline double slope(Activation a, double z) {  // central difference: independent of the derivative under test
  const double h = 1e-6;
  return (act(a, z + h) - act(a, z - h)) / (2 * h);
}
