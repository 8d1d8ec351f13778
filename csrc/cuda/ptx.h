// Everything the kernels ask of a GPU beyond C++: one small function per PTX instruction, and the launch. Compiled with
// PETL_EMULATE it is tests/cuda_emulator.h instead, which has the same functions for a CPU: the kernels' sources are
// tested there, as they are.
#pragma once

#include <cstdint>

#include "../petl.h"

namespace petl::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::kBFloat16;
};
template <>
struct DTypeOf<f16> {
  static constexpr DType value = DType::kFloat16;
};

constexpr int kWarp = 32;

}  // namespace petl::cuda

#ifdef PETL_EMULATE
#include "../tests/cuda_emulator.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>

#define PETL_DEVICE __device__ __forceinline__
#define PETL_BOTH __host__ __device__ __forceinline__

namespace petl::cuda {

// --- threads -------------------------------------------------------------------------------------------------------
PETL_DEVICE void sync_block() { __syncthreads(); }
PETL_DEVICE void sync_warp() { __syncwarp(); }
PETL_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
PETL_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// The dynamic shared memory of the block, on the 128 bytes that a row of a tile begins on.
PETL_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char petl_shared[];
  return petl_shared;
}

// --- conversions ---------------------------------------------------------------------------------------------------
PETL_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
PETL_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }

PETL_DEVICE float to_float(float value) { return value; }
PETL_DEVICE float to_float(bf16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }
PETL_DEVICE float to_float(f16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

template <typename T>
PETL_DEVICE T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
    T narrow;
    if constexpr (DTypeOf<T>::value == DType::kBFloat16) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    }
    return narrow;
  }
}

// Rounded to the 10 bits of mantissa that a tensor core reads of a float; NaN and infinity stay.
PETL_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// --- memory --------------------------------------------------------------------------------------------------------
PETL_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, past the registers: the first `bytes` from global memory, the others zero. They are there
// after the wait for their group, for other threads after a barrier too.
PETL_DEVICE void copy_async16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
PETL_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the kPending newest groups of this thread are under way.
template <int kPending>
PETL_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

PETL_DEVICE void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// Four 8 x 8 matrices of 16 bits; lane i gives the address of row i % 8 of matrix i / 8 and receives, of each, the
// elements 2 (i % 4) and the next of row i / 4, or, transposed, of column i / 4.
PETL_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
PETL_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// --- tensor cores: c [16 x 8] += a b, with k = 16 elements of 16 bits or 8 of tf32 -------------------------------------
template <typename T>
PETL_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (DTypeOf<T>::value == DType::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (DTypeOf<T>::value == DType::kFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// --- the host's side -----------------------------------------------------------------------------------------------
inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// Makes a device the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_));
    if (before_ != device) check(cudaSetDevice(device));
    changed_ = before_ != device;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <typename Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, int threads, int64_t shared_bytes, void* stream,
            const Arguments& arguments) {
  const auto bytes = static_cast<size_t>(shared_bytes);
  if (bytes > 48 * 1024) {  // more must be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  }
  kernel<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  check(cudaGetLastError());
}

}  // namespace petl::cuda
#endif
