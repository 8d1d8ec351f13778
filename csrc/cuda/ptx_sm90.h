// What sm_90a has beyond ptx.h, again one small function per PTX instruction: mbarriers, TMA, wgmma, clusters. Included only
// by sources that are compiled for sm_90a alone. With PETL_EMULATE it is tests/cuda_emulator_sm90.h.
//
// Two proxies see shared memory. The generic one is ordinary loads and stores, the async one TMA and what wgmma reads: what a
// thread has stored, async readers see after that thread's `fence_async` and a barrier.
#pragma once

#include "ptx.h"

namespace petl::cuda {

constexpr int kWarpgroup = 128;
constexpr int kMapRows = 64;  // rows and columns of a box
constexpr int kMapBytes = 64 * 128;

struct Pair {
  float x, y;
};

}  // namespace petl::cuda

#ifdef PETL_EMULATE
#include "../tests/cuda_emulator_sm90.h"
#else

#include <cuda.h>  // types alone; the driver's function is looked up when it is first needed

namespace petl::cuda {

// The dynamic shared memory of the block, on the 1024 bytes that a swizzled tile begins on.
PETL_DEVICE unsigned char* shared_memory_1024() {
  extern __shared__ __align__(1024) unsigned char petl_shared_1024[];
  return petl_shared_1024;
}

// --- threads -------------------------------------------------------------------------------------------------------
// A barrier of `count` threads, a multiple of a warp; id 0 is `sync_block`'s.
PETL_DEVICE void sync_threads(int id, int count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }
PETL_DEVICE void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
PETL_DEVICE void fence_global() { __threadfence(); }
PETL_DEVICE unsigned exchange(unsigned* at, unsigned value) { return atomicExch(at, value); }

// --- mbarriers: a phase is over when `arrivals` threads have come and all bytes that were announced are there ---------------
PETL_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// By the thread that initialised them, before `sync_block` shows them to the others.
PETL_DEVICE void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_async();
}
PETL_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
PETL_DEVICE void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is over: of a new barrier's phases the first has parity 0.
PETL_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// --- TMA -----------------------------------------------------------------------------------------------------------
using TensorMap = CUtensorMap;

// A box of the matrix from (row, col) on, zero outside of it, to a tile in shared memory; kMapBytes are counted on `barrier`.
PETL_DEVICE void load_box(void* tile, const TensorMap& map, uint64_t* barrier, int64_t row, int col) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(tile)),
      "l"(&map), "r"(col), "r"(static_cast<int>(row)), "r"(shared_address(barrier))
      : "memory");
}
// The other way; what lies outside of the matrix is not written.
PETL_DEVICE void store_box(const TensorMap& map, const void* tile, int64_t row, int col) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(col),
               "r"(static_cast<int>(row)), "r"(shared_address(tile))
               : "memory");
}
PETL_DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most the kPending newest groups of this thread still read shared memory.
template <int kPending>
PETL_DEVICE void store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// --- wgmma: d [64 x 64] += a b, k = 16 elements of 16 bits; by the 128 threads of a warpgroup ------------------------------
// Before the first of a group, and wherever registers that they use were touched.
PETL_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PETL_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the kPending newest groups are under way. Registers and tiles of those belong to the hardware.
template <int kPending>
PETL_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define PETL_SUMS                                                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31}"
#define PETL_SUM4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PETL_ALL_SUMS \
  PETL_SUM4(0), PETL_SUM4(4), PETL_SUM4(8), PETL_SUM4(12), PETL_SUM4(16), PETL_SUM4(20), PETL_SUM4(24), PETL_SUM4(28)
#define PETL_WGMMA(type)                                                                                         \
  asm volatile(                                                                                                  \
      "{\n"                                                                                                      \
      ".reg .pred add;\n"                                                                                        \
      "setp.ne.b32 add, %34, 0;\n"                                                                               \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " PETL_SUMS ", %32, %33, add, 1, 1, %35, %36;\n" \
      "}\n"                                                                                                      \
      : PETL_ALL_SUMS                                                                                            \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposedA), "n"(kTransposedB))
#define PETL_WGMMA_REGISTERS(type)                                                                                        \
  asm volatile(                                                                                                           \
      "{\n"                                                                                                               \
      ".reg .pred add;\n"                                                                                                 \
      "setp.ne.b32 add, %37, 0;\n"                                                                                        \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " PETL_SUMS ", {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n" \
      "}\n"                                                                                                               \
      : PETL_ALL_SUMS                                                                                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

// Both from shared memory, by descriptors; without `add` d is overwritten. Transposed: m or n contiguous, not k.
template <typename T, int kTransposedA, int kTransposedB>
PETL_DEVICE void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  if constexpr (DTypeOf<T>::value == DType::kBFloat16) {
    PETL_WGMMA("bf16");
  } else {
    PETL_WGMMA("f16");
  }
}
// a from registers.
template <typename T>
PETL_DEVICE void wgmma_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  if constexpr (DTypeOf<T>::value == DType::kBFloat16) {
    PETL_WGMMA_REGISTERS("bf16");
  } else {
    PETL_WGMMA_REGISTERS("f16");
  }
}
#undef PETL_SUMS
#undef PETL_SUM4
#undef PETL_ALL_SUMS
#undef PETL_WGMMA
#undef PETL_WGMMA_REGISTERS

// --- clusters ------------------------------------------------------------------------------------------------------
PETL_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
PETL_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
PETL_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where the block `rank` of the cluster has what this one has at `pointer`.
PETL_DEVICE uint32_t remote_address(const void* pointer, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}
PETL_DEVICE Pair load_remote(const float* pointer, int rank) {
  Pair pair;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(pair.x), "=f"(pair.y)
               : "r"(remote_address(pointer, rank))
               : "memory");
  return pair;
}
PETL_DEVICE void store_remote(void* pointer, int rank, uint32_t bits) {
  asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(remote_address(pointer, rank)), "r"(bits) : "memory");
}

// --- the host's side -----------------------------------------------------------------------------------------------
// A matrix of 16-bit elements whose base and row stride are on 16 bytes, in boxes of kMapRows x 64 columns, swizzled as
// tiles.h swizzles. Nothing of it touches the device: the driver packs 128 bytes.
inline TensorMap tensor_map(const Rows& m, int64_t rows, int64_t cols) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                              const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (!found) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is older than 12.0");
    return reinterpret_cast<Encode>(found);
  }();
  TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>((rows > 1 ? m.stride : cols) * 2)};
  const cuuint32_t box[] = {64, kMapRows}, steps[] = {1, 1};
  const auto type = m.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (encode(&map, type, 2, m.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled refused a matrix");
  }
  return map;
}

inline void zero_async(void* data, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

inline cudaLaunchConfig_t cluster_launch(cudaLaunchAttribute& attribute, int64_t blocks, int cluster, int threads,
                                         int64_t shared_bytes, void* stream) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster), attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = 1;
  return config;
}

// How many clusters the device runs at the same time.
template <typename Arguments>
int64_t clusters_at_once(void (*kernel)(Arguments), int cluster, int threads, int64_t shared_bytes, int) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = cluster_launch(attribute, cluster, cluster, threads, shared_bytes, nullptr);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  return clusters;
}

// `cluster` neighbouring blocks run at the same time and reach each other's shared memory.
template <typename Arguments>
void launch_clusters(void (*kernel)(Arguments), int64_t blocks, int cluster, int threads, int64_t shared_bytes, void* stream,
                     const Arguments& arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = cluster_launch(attribute, blocks, cluster, threads, shared_bytes, stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments));
}

}  // namespace petl::cuda
#endif
