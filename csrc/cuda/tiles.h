// Tiles in shared memory and how they are filled. A row of a tile is 128 bytes, 8 chunks of 16: 64 elements of 16 bits or
// 32 floats. Chunk c of row i lies at c ^ (i % 8), so that the 8 rows that one ldmatrix phase reads at one c lie in
// different banks, as do the 8 chunks of the row that 8 threads write.
#pragma once

#include <stdexcept>

#include "ptx.h"

namespace petl::cuda {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRowBytes = 128, kChunks = 8;
template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kWidth = kRowBytes / static_cast<int>(sizeof(T));  // columns of a tile

PETL_BOTH constexpr int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
PETL_BOTH constexpr int64_t round_up(int64_t value, int64_t multiple) { return cdiv(value, multiple) * multiple; }

PETL_DEVICE unsigned char* chunk_of(unsigned char* tile, int row, int chunk) {
  return tile + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}
template <typename T>
PETL_DEVICE T* element_of(unsigned char* tile, int row, int col) {
  return reinterpret_cast<T*>(chunk_of(tile, row, col / kChunk<T>)) + col % kChunk<T>;
}

// A matrix in global memory as tiles are filled from it.
struct Source {
  const void* data;
  DType dtype;
  bool vectors;  // every row begins on 16 bytes
  int64_t stride, rows;
  int cols;
};

inline bool on_16_bytes(const Rows& m) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * element_bytes(m.dtype) % 16 == 0;
}
inline Source source(const Rows& m, int64_t rows, int64_t cols) {
  return {m.data, m.dtype, on_16_bytes(m), m.stride, rows, static_cast<int>(cols)};
}

// Calls f with a null pointer of the type that `dtype` names.
template <typename F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kBFloat16: return f(static_cast<bf16*>(nullptr));
    case DType::kFloat16: return f(static_cast<f16*>(nullptr));
    default: throw std::invalid_argument("there are no CUDA kernels of float64");
  }
}

PETL_DEVICE float load_float(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kBFloat16) return to_float(static_cast<const bf16*>(data)[i]);
  if (dtype == DType::kFloat16) return to_float(static_cast<const f16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}
PETL_DEVICE void store_float(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::kBFloat16) {
    static_cast<bf16*>(data)[i] = from_float<bf16>(value);
  } else if (dtype == DType::kFloat16) {
    static_cast<f16*>(data)[i] = from_float<f16>(value);
  } else {
    static_cast<float*>(data)[i] = value;
  }
}

template <typename T>
struct alignas(16) Chunk {
  T values[kChunk<T>];
};

// 16 bytes of a tile from (row, col) on, zero outside the matrix: by cp.async where the matrix has the tile's dtype and
// is aligned, else through the registers, which convert.
template <typename T>
PETL_DEVICE void load_chunk(unsigned char* to, const Source& m, int64_t row, int col, float factor) {
  int count = row < m.rows ? m.cols - col : 0;
  count = count < 0 ? 0 : count > kChunk<T> ? kChunk<T> : count;
  const int64_t at = row * m.stride + col;
  if (m.vectors && m.dtype == DTypeOf<T>::value && factor == 1) {
    const T* from = static_cast<const T*>(m.data) + (count ? at : 0);
    copy_async16(to, from, count * static_cast<int>(sizeof(T)));
    return;
  }
  Chunk<T> chunk;
  if (m.vectors && m.dtype == DType::kFloat32 && count == kChunk<T>) {
    const auto* from = reinterpret_cast<const Chunk<float>*>(static_cast<const float*>(m.data) + at);
#pragma unroll
    for (int i = 0; i < kChunk<T> / 4; ++i) {
      const Chunk<float> four = from[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) chunk.values[4 * i + j] = from_float<T>(four.values[j] * factor);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      chunk.values[i] = from_float<T>(i < count ? load_float(m.data, m.dtype, at + i) * factor : 0.0f);
    }
  }
  *reinterpret_cast<Chunk<T>*>(to) = chunk;
}

PETL_DEVICE float half_to_float(uint16_t bits, bool brain) { return brain ? to_float(bf16{bits}) : to_float(f16{bits}); }
PETL_DEVICE uint16_t float_to_half(float value, bool brain) {
  return brain ? from_float<bf16>(value).bits : from_float<f16>(value).bits;
}

// kCount elements of a row from `col` on as floats, `outside` where the matrix has none or is absent.
template <int kCount>
PETL_DEVICE void load_floats(float (&values)[kCount], const Source& m, int64_t row, int col, float outside = 0) {
  int count = m.data && row < m.rows ? m.cols - col : 0;
  count = count < 0 ? 0 : count > kCount ? kCount : count;
  const bool whole = m.vectors && count == kCount, brain = m.dtype == DType::kBFloat16;
  const auto* const floats = static_cast<const float*>(m.data) + row * m.stride + col;
  const auto* const halves = static_cast<const uint16_t*>(m.data) + row * m.stride + col;
  if (m.dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      if (whole) {
        const Chunk<float> four = *reinterpret_cast<const Chunk<float>*>(floats + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[i + j] = four.values[j];
      } else {
#pragma unroll
        for (int j = i; j < i + 4; ++j) values[j] = j < count ? floats[j] : outside;
      }
    }
  } else if (kCount == 8 && whole) {
    const Chunk<bf16> eight = *reinterpret_cast<const Chunk<bf16>*>(halves);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = half_to_float(eight.values[i % 8].bits, brain);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = i < count ? half_to_float(halves[i], brain) : outside;
  }
}

// The way back: those of the row's `cols` elements that are there.
template <int kCount>
PETL_DEVICE void store_floats(const Rows& m, bool vectors, int64_t row, int col, int cols, const float (&values)[kCount]) {
  const bool whole = vectors && col + kCount <= cols, brain = m.dtype == DType::kBFloat16;
  auto* const floats = static_cast<float*>(m.data) + row * m.stride + col;
  auto* const halves = static_cast<uint16_t*>(m.data) + row * m.stride + col;
  if (m.dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      if (whole) {
        *reinterpret_cast<Chunk<float>*>(floats + i) = {{values[i], values[i + 1], values[i + 2], values[i + 3]}};
      } else {
#pragma unroll
        for (int j = i; j < i + 4; ++j) {
          if (col + j < cols) floats[j] = values[j];
        }
      }
    }
    return;
  }
  uint16_t bits[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits[i] = float_to_half(values[i], brain);
  if (kCount == 8 && whole) {
    Chunk<bf16> eight;
#pragma unroll
    for (int i = 0; i < kCount; ++i) eight.values[i % 8].bits = bits[i];
    *reinterpret_cast<Chunk<bf16>*>(halves) = eight;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (col + i < cols) halves[i] = bits[i];
    }
  }
}

// Asks for `height` rows to be in the L2 cache when they are read.
PETL_DEVICE void prefetch_rows(const Source& m, int64_t row, int height) {
  const int64_t bytes = m.dtype == DType::kFloat32 ? 4 : 2;
  const int lines = m.data ? static_cast<int>(cdiv(m.cols * bytes, 128)) : 0;
  for (int i = static_cast<int>(threadIdx.x); i < height * lines; i += kThreads) {
    const int64_t n = row + i / lines;
    if (n < m.rows) prefetch_l2(static_cast<const unsigned char*>(m.data) + n * m.stride * bytes + i % lines * 128);
  }
}

// `height` rows of a tile from (row, col) on, by all threads of the block.
template <typename T>
PETL_DEVICE void load_tile(unsigned char* tile, int height, const Source& m, int64_t row, int col) {
  for (int i = static_cast<int>(threadIdx.x); i < height * kChunks; i += kThreads) {
    const int down = i / kChunks, c = i % kChunks;
    load_chunk<T>(chunk_of(tile, down, c), m, row + down, col + c * kChunk<T>, 1.0f);
  }
}

// The same for a matrix whose rows are multiplied by `factors` (null: not at all).
template <typename T>
PETL_DEVICE void load_tile_scaled(unsigned char* tile, int height, const Source& m, int64_t row, int col,
                                  const void* factors, DType dtype) {
  for (int i = static_cast<int>(threadIdx.x); i < height * kChunks; i += kThreads) {
    const int down = i / kChunks, c = i % kChunks;
    const bool scaled = factors && row + down < m.rows;
    const float factor = scaled ? load_float(factors, dtype, row + down) : 1.0f;
    load_chunk<T>(chunk_of(tile, down, c), m, row + down, col + c * kChunk<T>, factor);
  }
}

}  // namespace petl::cuda
