// A call of the channel adapter in both directions, by the kernels that the caller names, against a plain loop in double.
// Gradients against the textbook formulas; channels that are not chosen compared as bits.
#pragma once

#include "testing.h"

// What is not chosen is a copy of bits, of the payload of a NaN too.
inline void compare_bits(const std::string& what, const Stored& got, const Stored& from, const std::vector<int64_t>& channels) {
  for (int64_t i = 0; i < from.n; ++i) {
    for (int64_t j = 0; j < from.cols; ++j) {
      if (std::find(channels.begin(), channels.end(), j) != channels.end()) continue;
      if (std::memcmp(got.at(i, j), from.at(i, j), from.element()) == 0) continue;
      return expect(false, text(what, ": row ", i, ", channel ", j, " changed"));
    }
  }
}

// An all-ones pattern, a NaN with its whole payload, into the last channel that is not chosen.
inline void spoil(Stored& m, const std::vector<int64_t>& channels) {
  int64_t j = m.cols - 1;
  while (j >= 0 && std::find(channels.begin(), channels.end(), j) != channels.end()) --j;
  for (int64_t i = 0; i < m.n && j >= 0; i += 3) std::memset(m.at(i, j), 0xff, m.element());
}

struct ChannelSizes {
  int64_t n, d, k, gap;
};

// `forward` and `backward` take the structs of petl.h.
template <typename Forward, typename Backward>
void run_channel_adapter(const std::string& where, ChannelSizes s, DType dtype, DType weights, bool scale_input, bool learned,
                         int threads, Forward forward, Backward backward) {
  std::mt19937 rng(static_cast<unsigned>(s.n * 31 + s.d * 7 + s.k));
  const std::vector<int64_t> channels = choose(rng, s.k, s.d);
  Stored x(rng, s.n, s.d, dtype, s.gap), g(rng, s.n, s.d, dtype, s.gap), weight(rng, s.k, s.k, weights);
  Stored bias(rng, 1, s.k, weights), scale(rng, 1, 1, weights);
  spoil(x, channels), spoil(g, channels);
  const double alpha = 1.25, factor = alpha * (learned ? scale(0, 0) : 1.0);
  const double outer = scale_input ? factor : 1, inner = scale_input ? 1 : factor;

  const auto square = static_cast<size_t>(s.k * s.k);
  Values want_y(static_cast<size_t>(s.n * s.k)), want_x = want_y, want_dx = want_y, dweight(square);
  Values dbias(static_cast<size_t>(s.k)), dscale(1);
  double dscale_squares = 0;
  for (int64_t i = 0; i < s.n; ++i) {
    for (int64_t a = 0; a < s.k; ++a) {
      const int64_t ca = channels[static_cast<size_t>(a)];
      const auto e = static_cast<size_t>(i * s.k + a);
      double u = bias(0, a);
      for (int64_t b = 0; b < s.k; ++b) {
        const int64_t cb = channels[static_cast<size_t>(b)];
        u += x(i, cb) * weight(a, b);
        want_dx[e] += inner * g(i, cb) * weight(b, a);
        dweight[static_cast<size_t>(a * s.k + b)] += inner * g(i, ca) * x(i, cb);
      }
      want_x[e] = x(i, ca);
      want_y[e] = outer * x(i, ca) + inner * u;
      want_dx[e] += outer * g(i, ca);
      dbias[static_cast<size_t>(a)] += inner * g(i, ca);
      const double term = alpha * g(i, ca) * (scale_input ? x(i, ca) : u);
      dscale[0] += term, dscale_squares += term * term;
    }
  }

  Stored y(s.n, s.d, dtype, s.gap), x_channels(s.n, s.k, dtype), dx(s.n, s.d, dtype, s.gap);
  Stored got_dweight(s.k, s.k, weights), got_dbias(1, s.k, weights), got_dscale(1, 1, weights);
  const Rows scale_rows = learned ? scale.rows() : Rows{}, dscale_rows = learned ? got_dscale.rows() : Rows{};
  forward(ChannelAdapterForward{s.n, s.d, s.k, channels.data(), x.rows(), weight.rows(), bias.rows(), scale_rows,
                                     alpha, scale_input, y.rows(), x_channels.rows(), threads});
  backward(ChannelAdapterBackward{s.n, s.d, s.k, channels.data(), g.rows(), x_channels.rows(), weight.rows(),
                                      bias.rows(), scale_rows, alpha, scale_input, dx.rows(), got_dweight.rows(),
                                      got_dbias.rows(), dscale_rows, threads});

  const std::string name = text(where, " n=", s.n, " d=", s.d, " k=", s.k, " ", dtype_name(dtype),
                                scale_input ? " scale_input " : " ", learned ? "learned " : "");
  Stored y_channels(s.n, s.k, dtype), dx_channels(s.n, s.k, dtype);
  for (int64_t i = 0; i < s.n; ++i) {
    for (int64_t a = 0; a < s.k; ++a) {
      const int64_t c = channels[static_cast<size_t>(a)];
      std::memcpy(y_channels.at(i, a), y.at(i, c), y.element());
      std::memcpy(dx_channels.at(i, a), dx.at(i, c), dx.element());
    }
  }
  compare_bits(name + "y", y, x, channels);
  compare_bits(name + "dx", dx, g, channels);
  compare(name + "y", y_channels, want_y, tolerance(dtype));
  compare(name + "x_channels", x_channels, want_x, 0);
  compare(name + "dx", dx_channels, want_dx, tolerance(dtype));
  compare(name + "dweight", got_dweight, dweight, tolerance(dtype));
  compare(name + "dbias", got_dbias, dbias, tolerance(dtype));
  // A sum over n and k of either sign, measured against what such a sum comes to at random.
  if (learned) compare(name + "dscale", got_dscale, dscale, tolerance(dtype), std::sqrt(dscale_squares));
}
