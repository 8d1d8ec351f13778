// Operands of wgmma: tiles of tiles.h, 64 rows of 128 bytes whose chunks are swizzled, beginning on 1024 bytes. TMA fills them
// so (CU_TENSOR_MAP_SWIZZLE_128B), `chunk_of` finds their elements. A step of a product is k = 16 deep.
#pragma once

#include "ptx_sm90.h"
#include "tiles.h"

namespace petl::cuda {

constexpr int kTileRows = kMapRows, kTileBytes = kMapBytes;
constexpr int kTileSteps = 4;  // of 16, either way: a tile is 64 x 64

// A matrix descriptor ("Matrix Descriptor Format" of wgmma in the PTX manual): address, leading and stride byte offset in
// units of 16 bytes, swizzle 1 (128 bytes). The stride is that from 8 rows to the next 8; the leading one means nothing
// for rows of 128 bytes of which one tile is all there is.
PETL_DEVICE uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kLeading = 1, kStride = 8 * kRowBytes / 16, kSwizzle128 = 1;
  return (address & 0x3ffffu) >> 4 | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}
// Step k of a tile whose rows are m or n and whose columns are k: 16 columns are 32 bytes on.
PETL_DEVICE uint64_t operand(const unsigned char* tile, int k) { return descriptor(shared_address(tile) + k * 32); }
// Step k of a tile whose rows are k: 16 rows on.
PETL_DEVICE uint64_t operand_transposed(const unsigned char* tile, int k) {
  return descriptor(shared_address(tile) + k * 16 * kRowBytes);
}

// Sums [64 x 64]: element i of a thread is in row `sum_row` and column `sum_col`.
PETL_DEVICE int sum_row(int thread, int i) { return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8; }
PETL_DEVICE int sum_col(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

template <typename T>
PETL_DEVICE uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(low).bits) | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <typename T>
PETL_DEVICE Pair unpack(uint32_t bits) {
  return {to_float(T{static_cast<uint16_t>(bits)}), to_float(T{static_cast<uint16_t>(bits >> 16)})};
}

}  // namespace petl::cuda
