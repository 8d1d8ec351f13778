// The eight activations and their derivatives, chosen at run time: they are computed for N r elements only.
#pragma once

#include <cmath>

#include "ptx.h"

namespace petl::cuda {

struct Activated {
  float value, slope;
};

PETL_DEVICE Activated activate(float z, Activation activation) {
  switch (activation) {
    case Activation::kRelu:  // NaN comes out as NaN
      return {z < 0 ? 0.0f : z, z <= 0 ? 0.0f : 1.0f};
    case Activation::kLeakyRelu:
      return {z > 0 ? z : 0.01f * z, z > 0 ? 1.0f : 0.01f};
    case Activation::kGelu: {
      const float cdf = 0.5f * (1.0f + erff(z * 0.7071067811865475f));
      return {z * cdf, cdf + z * 0.3989422804014327f * expf(-0.5f * z * z)};
    }
    case Activation::kGeluTanh: {
      const float square = z * z, t = tanhf(0.7978845608028654f * (z + 0.044715f * square * z));
      const float inner = 0.7978845608028654f * (1.0f + 3 * 0.044715f * square);
      return {0.5f * z * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * inner};
    }
    case Activation::kSilu: {
      const float gate = 1.0f / (1.0f + expf(-z));
      return {z * gate, gate * (1.0f + z * (1.0f - gate))};
    }
    case Activation::kTanh: {
      const float t = tanhf(z);
      return {t, 1.0f - t * t};
    }
    case Activation::kSigmoid: {
      const float gate = 1.0f / (1.0f + expf(-z));
      return {gate, gate * (1.0f - gate)};
    }
    default:
      return {z, 1.0f};
  }
}

}  // namespace petl::cuda
