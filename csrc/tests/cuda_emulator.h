// The functions of cuda/ptx.h for a CPU, so that the tests run the kernels' own sources without a GPU. Threads are
// the fibers of cuda_machine.h; what a warp does together (shuffles, ldmatrix, mma) is computed by the fragment layouts of
// the PTX manual once all 32 lanes are there.
//
// What it is made to find, beside wrong arithmetic:
//   - shared memory begins as NaN and is exactly as long as was asked for, so that AddressSanitizer sees a step outside;
//   - cp.async puts NaN in its place at once and the data there no sooner than at the wait for its group;
//   - odd blocks run their threads in reverse, so that one order hides no missing barrier;
//   - lanes that meet in different instructions, a barrier that some never reach, addresses off their alignment, and, as
//     a count, ldmatrix phases whose rows collide in the banks.
// What it cannot find: races inside a warp, whose lanes take turns, and anything of time.
#pragma once

#include <cmath>

#include "cuda_machine.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define PETL_DEVICE inline
#define PETL_BOTH inline

namespace petl::cuda {

// --- threads -------------------------------------------------------------------------------------------------------
inline void sync_block() {
  emulator::meet(emulator::machine.block().barrier, static_cast<unsigned>(emulator::machine.threads), -1, nullptr, {});
}
inline void sync_warp() {
  emulator::meet_warp([](emulator::Arrival*) {}, nullptr, nullptr, nullptr);
}
inline float shuffle_xor(float value, int mask) {
  float got = 0;
  emulator::meet_warp(
      [](emulator::Arrival* lanes) {
        for (int i = 0; i < kWarp; ++i) {
          const int other = i ^ *static_cast<const int*>(lanes[i].in[1]);
          *static_cast<float*>(lanes[i].out) = *static_cast<const float*>(lanes[other].in[0]);
        }
      },
      &value, &mask, &got);
  return got;
}
inline float shuffle(float value, int lane) {
  float got = 0;
  emulator::meet_warp(
      [](emulator::Arrival* lanes) {
        for (int i = 0; i < kWarp; ++i) {
          const int other = *static_cast<const int*>(lanes[i].in[1]);
          *static_cast<float*>(lanes[i].out) = *static_cast<const float*>(lanes[other].in[0]);
        }
      },
      &value, &lane, &got);
  return got;
}
inline unsigned char* shared_memory() { return emulator::machine.block().shared.data(); }

// --- conversions ---------------------------------------------------------------------------------------------------
inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(f16 value) {
  const int exponent = (value.bits >> 10) & 31, fraction = value.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                                    : std::ldexp(static_cast<float>(fraction), -24);
  return value.bits & 0x8000 ? -size : size;
}

// To the nearest value with `bits` of mantissa, ties to even; NaN and infinity stay.
inline float rounded(float value, int bits, int least_exponent) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), least_exponent);
  return std::ldexp(std::nearbyint(std::ldexp(value, bits - exponent)), exponent - bits);
}

template <typename T>
T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (DTypeOf<T>::value == DType::kBFloat16) {
    if (std::isnan(value)) return {0x7fff};
    const uint32_t bits = float_to_bits(value);
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
    if (std::isnan(value)) return {0x7fff};
    const float size = std::abs(rounded(value, 10, -14));
    if (size > 65504.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (size < std::ldexp(1.0f, -14)) return {static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(size, 24)))};
    const int exponent = std::ilogb(size);
    const int fraction = static_cast<int>(std::ldexp(size, 10 - exponent)) - 1024;
    return {static_cast<uint16_t>(sign | ((exponent + 15) << 10) | fraction)};
  }
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = float_to_bits(value);
  if (!std::isfinite(value)) return std::isnan(value) ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

// --- memory --------------------------------------------------------------------------------------------------------
inline void copy_async16(void* shared, const void* global, int bytes) {
  emulator::Fiber& fiber = emulator::machine.fibers[static_cast<size_t>(emulator::machine.current)];
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    emulator::fail("cp.async of an address that is not on 16 bytes");
  }
  std::memset(shared, 0xff, 16);
  fiber.copies.push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, fiber.groups});
  emulator::machine.counters.copied_bytes += bytes;
}
inline void copy_async_commit() { ++emulator::machine.fibers[static_cast<size_t>(emulator::machine.current)].groups; }
template <int kPending>
void copy_async_wait() {
  emulator::Fiber& fiber = emulator::machine.fibers[static_cast<size_t>(emulator::machine.current)];
  std::vector<emulator::Copy> later;
  for (const emulator::Copy& copy : fiber.copies) {
    if (copy.group >= fiber.groups - kPending) {
      later.push_back(copy);
      continue;
    }
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  }
  fiber.copies = later;
}

inline void prefetch_l2(const void* global) {  // AddressSanitizer is to see where
  [[maybe_unused]] const volatile unsigned char byte = *static_cast<const volatile unsigned char*>(global);
}

template <bool kTransposed>
void matrices(emulator::Arrival* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) {
      const auto address = reinterpret_cast<uintptr_t>(lanes[8 * matrix + row].in[0]);
      if (address % 16) emulator::fail("ldmatrix of an address that is not on 16 bytes");
      std::memcpy(elements[row], reinterpret_cast<const void*>(address), 16);
      banks |= 1u << (address / 16 % 8);
    }
    emulator::machine.counters.collisions += banks != 0xff;
    for (int lane = 0; lane < kWarp; ++lane) {
      const int row = lane / 4, col = 2 * (lane % 4);
      const uint32_t low = kTransposed ? elements[col][row] : elements[row][col];
      const uint32_t high = kTransposed ? elements[col + 1][row] : elements[row][col + 1];
      static_cast<uint32_t*>(lanes[lane].out)[matrix] = low | high << 16;
    }
  }
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulator::meet_warp(matrices<false>, row, nullptr, r);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulator::meet_warp(matrices<true>, row, nullptr, r);
}

// --- tensor cores --------------------------------------------------------------------------------------------------
// Element `half` of a register: the low or high 16 bits, or all of a float, of which a tensor core reads 19 bits.
template <typename T>
float element_in(uint32_t bits, int half) {
  if constexpr (sizeof(T) == 4) {
    return bits_to_float(bits & 0xffffe000u);
  } else {
    return to_float(T{static_cast<uint16_t>(half ? bits >> 16 : bits)});
  }
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "mma.m16n8k8" (.tf32).
template <typename T>
void mma_all(emulator::Arrival* lanes) {
  constexpr int kPer = 4 / static_cast<int>(sizeof(T)), kK = 8 * kPer;  // elements per register; depth
  float a[16][kK], b[kK][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* ra = static_cast<const uint32_t*>(lanes[lane].in[0]);
    const auto* rb = static_cast<const uint32_t*>(lanes[lane].in[1]);
    const int group = lane / 4, member = lane % 4;
    for (int e = 0; e < kPer; ++e) {
      for (int i = 0; i < 4; ++i) {
        a[group + (i % 2 ? 8 : 0)][member * kPer + e + (i / 2 ? kK / 2 : 0)] = element_in<T>(ra[i], e);
      }
      for (int i = 0; i < 2; ++i) b[member * kPer + e + i * kK / 2][group] = element_in<T>(rb[i], e);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* c = static_cast<float*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i / 2 ? 8 : 0), col = 2 * (lane % 4) + i % 2;
      double sum = 0;
      for (int k = 0; k < kK; ++k) sum += static_cast<double>(a[row][k]) * b[k][col];
      c[i] += static_cast<float>(sum);
    }
  }
}
template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::meet_warp(mma_all<T>, a, b, c);
}

// --- the host's side -----------------------------------------------------------------------------------------------
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <typename Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, int threads, int64_t shared_bytes, void*, const Arguments& arguments) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments* arguments;
  } call{kernel, &arguments};
  emulator::run_grid(
      grid, threads, static_cast<size_t>(shared_bytes),
      [](void* given) {
        const auto* c = static_cast<Call*>(given);
        c->kernel(*c->arguments);
      },
      &call);
}

}  // namespace petl::cuda
