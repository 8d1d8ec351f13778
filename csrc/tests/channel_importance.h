// The scores of channel_importance by a plain loop in double.
#pragma once

#include "testing.h"

struct SampleSizes {
  int64_t samples, sample_rows, d, gap;
};

// Compares the score of every channel; the error may be `tolerance` of the largest that the sums could have become.
inline void compare_scores(const std::string& what, const SampleSizes& s, Reduction reduction, const Stored& a,
                           const Stored& g, const Stored& scores, double tolerance) {
  for (int64_t c = 0; c < s.d; ++c) {
    double sum = 0, absolute = 0, squares = 0;
    for (int64_t i = 0; i < s.samples; ++i) {
      double sample = 0;
      for (int64_t j = 0; j < s.sample_rows; ++j) {
        const double product = a(i * s.sample_rows + j, c) * g(i * s.sample_rows + j, c);
        sample += product;
        absolute += std::abs(product);
      }
      sum += sample;
      squares += sample * sample;
    }
    const double wanted = reduction == Reduction::kAbs ? absolute : reduction == Reduction::kSqBatch ? sum * sum : squares;
    if (!(std::abs(scores(0, c) - wanted) <= tolerance * (absolute * absolute + 1))) {
      return expect(false, text(what, s.samples, "x", s.sample_rows, "x", s.d, " reduction ", static_cast<int>(reduction),
                                ", channel ", c, ": got ", scores(0, c), ", wanted ", wanted));
    }
  }
}
