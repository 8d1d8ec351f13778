// Vectors of the instruction set this translation unit is compiled for, and the conversions between storage types
// and the type we compute in. Every kernel file is compiled once per instruction set, with PETL_ISA naming it; all
// code lives in that namespace so that the linker never merges an AVX-512 body into the baseline.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if !defined(PETL_ISA)
#error "PETL_ISA must name the instruction set"
#endif

#define PETL_INLINE inline __attribute__((always_inline))

namespace petl::PETL_ISA {

// Vector width, and the rows of a register tile: rows x 2 accumulators plus 2 vectors of B and one broadcast fill the
// register file (32 registers for AVX-512 and NEON, 16 for the others).
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 14;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 14;
#else
constexpr int kVectorBytes = 16, kTileRows = 6;
#endif

template <typename T, int kBytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kTileCols = 2 * kLanes<T>;

PETL_INLINE Vec<float> square_root(Vec<float> x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
PETL_INLINE Vec<double> square_root(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// Storage types: 16-bit patterns that we widen before computing.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

using Half = VectorOf<uint16_t, kVectorBytes / 2>::type;  // as many 16-bit patterns as a Vec<float> has lanes
using Bits = Vec<uint32_t>;

template <typename V>
PETL_INLINE V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename C>
PETL_INLINE Vec<C> splat(C value) {
  return Vec<C>{} + value;
}

template <typename C>
PETL_INLINE C sum_lanes(Vec<C> v) {
  C lane[kLanes<C>];
  std::memcpy(lane, &v, sizeof(v));
  for (int width = kLanes<C> / 2; width; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

template <typename To, typename From>
PETL_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Zero extension and truncation, spelled out where GCC 12 takes __builtin_convertvector apart: with it a pass over two
// bf16 operands in the L3 cache ran at 70 instead of 99 GB/s (AVX2; 108 instead of 117 with AVX-512).
PETL_INLINE Bits widen_bits(Half half) {
#if defined(__AVX512F__)
  return bit_cast<Bits>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(half)));
#elif defined(__AVX2__)
  return bit_cast<Bits>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(half)));
#else
  return __builtin_convertvector(half, Bits);
#endif
}
PETL_INLINE Half narrow_bits(Bits bits) {
#if defined(__AVX512F__)
  return bit_cast<Half>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, Half);
#endif
}

PETL_INLINE Vec<float> widen_f16(Half half) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bit_cast<__m256i>(half));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(half));
#else
  const Bits h = __builtin_convertvector(half, Bits);
  const Bits magnitude = (h & 0x7fffu) << 13;
  const float rebias = 0x1p112f;  // multiplying fixes the exponent of normals and subnormals alike
  Bits out = bit_cast<Bits>(bit_cast<Vec<float>>(magnitude) * rebias);
  out |= magnitude >= (0x7c00u << 13) ? Bits{} + 0x7f800000u : Bits{};  // infinity and NaN
  return bit_cast<Vec<float>>(out | ((h & 0x8000u) << 16));
#endif
}

PETL_INLINE Half narrow_f16(Vec<float> value) {
#if defined(__AVX512F__)
  return bit_cast<Half>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bit_cast<Half>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const Bits bits = bit_cast<Bits>(value);
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits special = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  // Adding 0.5 leaves the subnormal's bits, rounded to nearest even, at the bottom of the float.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  Bits out = magnitude < 0x38800000u ? subnormal : normal;
  out = magnitude >= 0x47800000u ? special : out;
  return __builtin_convertvector(out | ((bits >> 16) & 0x8000u), Half);
#endif
}

PETL_INLINE Half narrow_bf16(Vec<float> value) {
  const Bits bits = bit_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN into infinity
  return narrow_bits((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// Loads kLanes<C> elements of storage type T as C. The scalar forms below them serve the ragged edges.
template <typename C, typename T>
struct Storage;

template <typename C>
struct Storage<C, C> {
  static PETL_INLINE Vec<C> load(const C* p) { return load_raw<Vec<C>>(p); }
  static PETL_INLINE void store(C* p, Vec<C> v) { std::memcpy(p, &v, sizeof(v)); }
};
template <>
struct Storage<float, bf16> {
  static PETL_INLINE Vec<float> load(const bf16* p) {
    return bit_cast<Vec<float>>(widen_bits(load_raw<Half>(p)) << 16);
  }
  static PETL_INLINE void store(bf16* p, Vec<float> v) {
    const Half h = narrow_bf16(v);
    std::memcpy(p, &h, sizeof(h));
  }
};
template <>
struct Storage<float, f16> {
  static PETL_INLINE Vec<float> load(const f16* p) { return widen_f16(load_raw<Half>(p)); }
  static PETL_INLINE void store(f16* p, Vec<float> v) {
    const Half h = narrow_f16(v);
    std::memcpy(p, &h, sizeof(h));
  }
};

// The first `count` (< kLanes) elements of a vector, through a buffer: for edges only.
template <typename C, typename T>
PETL_INLINE Vec<C> load_first(const T* p, int64_t count) {
  T buffer[kLanes<C>] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return Storage<C, T>::load(buffer);
}
template <typename C, typename T>
PETL_INLINE void store_first(T* p, Vec<C> v, int64_t count) {
  T buffer[kLanes<C>];
  Storage<C, T>::store(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace petl::PETL_ISA
