// What the tests of kernels share: matrices on buffers of the exact size, so that the sanitizers see a read or write
// past the end, their comparison with values computed in double, and the loop over instruction sets.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../cpu/kernels.h"

using namespace petl;
using Values = std::vector<double>;

inline int failures = 0;

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline void expect(bool right, const std::string& what) {
  if (right) return;
  std::printf("FAIL %s\n", what.c_str());
  std::fflush(stdout);
  ++failures;
}

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return "fp64";
    case DType::kFloat32: return "fp32";
    case DType::kBFloat16: return "bf16";
    case DType::kFloat16: return "fp16";
  }
  return "?";
}

// Relative to the largest element: some units in the last place of what is stored.
inline double tolerance(DType dtype) {
  return dtype == DType::kFloat64 ? 1e-13 : dtype == DType::kFloat32 ? 1e-5 : dtype == DType::kFloat16 ? 4e-3 : 3e-2;
}

// A matrix in storage type, `gap` unused elements between rows, exactly as long as its last row needs. What was not
// written, the gaps among it, is NaN in every storage type.
struct Stored {
  std::vector<unsigned char> bytes;
  DType dtype;
  int64_t n, cols, stride;

  Stored(int64_t n, int64_t cols, DType dtype, int64_t gap = 0) : dtype(dtype), n(n), cols(cols), stride(cols + gap) {
    if (n > 0 && cols > 0) bytes.resize(static_cast<size_t>((n - 1) * stride + cols) * element());
    clear();
  }
  // Multiples of 1/64 of at most 1.5, which every storage type holds exactly; with an offset float and double may.
  Stored(std::mt19937& rng, int64_t n, int64_t cols, DType dtype, int64_t gap = 0, double offset = 0)
      : Stored(n, cols, dtype, gap) {
    std::uniform_int_distribution<int> value(-96, 96);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < cols; ++j) put(i, j, value(rng) / 64.0 + offset);
    }
  }

  void clear() { std::fill(bytes.begin(), bytes.end(), static_cast<unsigned char>(0xff)); }
  Rows rows() { return bytes.empty() ? Rows{} : Rows{bytes.data(), dtype, stride}; }
  size_t element() const { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
  size_t offset(int64_t i, int64_t j) const { return static_cast<size_t>(i * stride + j) * element(); }
  unsigned char* at(int64_t i, int64_t j) { return bytes.data() + offset(i, j); }
  const unsigned char* at(int64_t i, int64_t j) const { return bytes.data() + offset(i, j); }

  double operator()(int64_t i, int64_t j) const {
    double wide;
    float single;
    uint16_t half;
    switch (dtype) {
      case DType::kFloat64: std::memcpy(&wide, at(i, j), 8); return wide;
      case DType::kFloat32: std::memcpy(&single, at(i, j), 4); return single;
      case DType::kBFloat16: {
        std::memcpy(&half, at(i, j), 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(&single, &bits, 4);
        return single;
      }
      case DType::kFloat16: {
        std::memcpy(&half, at(i, j), 2);
        const int exponent = (half >> 10) & 31, fraction = half & 1023;
        const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                            : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                           : std::ldexp(fraction, -24);
        return half & 0x8000 ? -size : size;
      }
    }
    return NAN;
  }

  Values values() const {
    Values all(static_cast<size_t>(n * cols));
    for (size_t e = 0; e < all.size(); ++e) {
      all[e] = (*this)(static_cast<int64_t>(e) / cols, static_cast<int64_t>(e) % cols);
    }
    return all;
  }

  void put(int64_t i, int64_t j, double value) {  // one that the storage type holds exactly
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == DType::kFloat16) {
      half = value == 0 ? 0 : static_cast<uint16_t>((half & 0x8000) | (((bits >> 13) & 0x3ffff) - (112 << 10)));
    }
    if (dtype == DType::kFloat64) std::memcpy(at(i, j), &value, 8);
    if (dtype == DType::kFloat32) std::memcpy(at(i, j), &single, 4);
    if (element() == 2) std::memcpy(at(i, j), &half, 2);
  }
};

// The largest error, relative to the largest value wanted or to `size` where that is more.
inline void compare(const std::string& what, const Stored& got, const Values& wanted, double tolerance,
                    double size = 0) {
  double largest = size, error = 0;
  for (size_t e = 0; e < wanted.size(); ++e) {
    const double difference = std::abs(got(static_cast<int64_t>(e) / got.cols, static_cast<int64_t>(e) % got.cols) -
                                       wanted[e]);
    error = std::max(error, std::isnan(difference) ? INFINITY : difference);
    largest = std::max(largest, std::abs(wanted[e]));
  }
  expect(static_cast<int64_t>(wanted.size()) == got.n * got.cols, what + ": not of the wanted size");
  expect(error <= tolerance * largest, text(what, ": error ", error, ", largest ", largest));
}

// k distinct channels of `among`, in any order.
inline std::vector<int64_t> choose(std::mt19937& rng, int64_t k, int64_t among) {
  std::vector<int64_t> channels(static_cast<size_t>(among));
  std::iota(channels.begin(), channels.end(), 0);
  std::shuffle(channels.begin(), channels.end(), rng);
  return {channels.begin(), channels.begin() + k};
}

// Says how it went; the exit status of the program.
inline int finish() {
  std::printf("%s\n", failures ? "FAILED" : "passed");
  return failures ? 1 : 0;
}

// Runs `test(isa)` in every instruction set this processor has; the exit status of the program.
template <typename Test>
int in_every_isa(Test test) {
  for (const std::string& isa : isas()) {
    set_isa(isa);
    test(isa);
    std::printf("%s: done\n", isa.c_str());
  }
  return finish();
}
