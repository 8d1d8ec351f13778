// Matrices between storage and compute type: widening tiles, packing weights into panels, splitting rows over threads.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#include "../petl.h"
#include "gemm.h"

namespace petl::PETL_ISA {

// The sanitizers' calls are small, and are to show what threads do to each other all the same.
#ifdef PETL_EVERY_THREAD_PAYS
constexpr bool kEveryThreadPays = true;
#else
constexpr bool kEveryThreadPays = false;
#endif

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <typename C>
using Same = std::common_type_t<C>;  // in an argument that C is not deduced from, so that null can be passed

template <typename T>
T* at(const Rows& m, int64_t row) {
  return static_cast<T*>(m.data) + row * m.stride;
}
inline Rows from_column(const Rows& m, int64_t col) {
  return {static_cast<char*>(m.data) + col * element_bytes(m.dtype), m.dtype, m.stride};
}

// Calls f with a null pointer of the storage type that `dtype` names.
template <typename C, typename F>
PETL_INLINE void with_storage(DType dtype, F f) {
  if constexpr (sizeof(C) == 8) {
    f(static_cast<double*>(nullptr));
  } else if (dtype == DType::kBFloat16) {
    f(static_cast<bf16*>(nullptr));
  } else if (dtype == DType::kFloat16) {
    f(static_cast<f16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

// One allocation for everything a call needs besides its outputs; `take` carves 64-byte aligned pieces off it.
class Workspace {
 public:
  explicit Workspace(int64_t bytes)
      : memory_(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64) + 64))), next_(static_cast<char*>(memory_)) {
    if (!memory_) throw std::bad_alloc();
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(memory_); }

  template <typename C>
  static int64_t bytes(int64_t count) {
    return round_up(count * static_cast<int64_t>(sizeof(C)), 64);
  }
  template <typename C>
  C* take(int64_t count) {
    C* piece = reinterpret_cast<C*>(next_);
    next_ += bytes<C>(count);
    return piece;
  }

 private:
  void* memory_;
  char* next_;
};

// dst[i, :] = src[row + i, :cols] for `rows` rows.
template <typename C>
void widen(const Rows& src, int64_t row, int64_t rows, int64_t cols, C* dst, int64_t ld) {
  with_storage<C>(src.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    for (int64_t i = 0; i < rows; ++i) {
      const S* from = static_cast<const S*>(src.data) + (row + i) * src.stride;
      C* to = dst + i * ld;
      int64_t c = 0;
      for (; c + kLanes<C> <= cols; c += kLanes<C>) Storage<C, C>::store(to + c, Storage<C, S>::load(from + c));
      if (c < cols) store_first<C, C>(to + c, load_first<C, S>(from + c, cols - c), cols - c);
    }
  });
}

// dst[row + i, :cols] = src[i, :] for `rows` rows.
template <typename C>
void narrow(const C* src, int64_t ld, int64_t rows, int64_t cols, const Rows& dst, int64_t row) {
  with_storage<C>(dst.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    for (int64_t i = 0; i < rows; ++i) {
      const C* from = src + i * ld;
      S* to = static_cast<S*>(dst.data) + (row + i) * dst.stride;
      int64_t c = 0;
      for (; c + kLanes<C> <= cols; c += kLanes<C>) Storage<C, S>::store(to + c, load_raw<Vec<C>>(from + c));
      if (c < cols) store_first<C, S>(to + c, load_first<C, C>(from + c, cols - c), cols - c);
    }
  });
}

// A tile of rows as the product reads it: in place when it already has the compute type, else widened into `scratch`.
template <typename C>
struct Operand {
  const C* data;
  int64_t ld;
};

template <typename C>
bool readable_in_place(const Rows& m, int64_t cols) {
  const bool same = m.dtype == (sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32);
  // Panels are read whole. Rows a multiple of 4 KiB apart fall into one set of the L1 cache, which has at least 8 ways:
  // tiles of 6 rows fit and are 10 % faster in place, tiles of 14 do not and are 15 % slower (d = 4096).
  const bool collide = m.stride * static_cast<int64_t>(sizeof(C)) % 4096 == 0;
  return same && cols % kTileCols<C> == 0 && !(collide && kTileRows > 8);
}

template <typename C>
int64_t scratch_stride(int64_t cols) {
  return round_up(cols, kTileCols<C>) + kLanes<C>;  // the extra vector keeps rows off one cache set
}

template <typename C>
Operand<C> operand(const Rows& m, int64_t row, int64_t rows, int64_t cols, C* scratch) {
  if (readable_in_place<C>(m, cols)) return {static_cast<const C*>(m.data) + row * m.stride, m.stride};
  widen(m, row, rows, cols, scratch, scratch_stride<C>(cols));
  return {scratch, scratch_stride<C>(cols)};
}

// Panels of kTileCols columns of a weight, [k][kTileCols], padded with zeros. `scale`, when given, multiplies.

// Column j of the panel is row `first + j` of w [n, k], times scale[first + j].
template <typename C>
void pack_transposed(const Rows& w, int64_t first, int64_t n, int64_t k, const Same<C>* scale, C* panel) {
  with_storage<C>(w.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    constexpr int kLane = kLanes<C>;
    constexpr int64_t kDepth = 8 * kLane;  // of k at a time, whose part of the panel stays in L1 for all columns
    for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
      const int64_t end = k - k0 < kDepth ? k : k0 + kDepth;
      for (int64_t j = 0; j < kTileCols<C>; ++j) {
        const bool inside = first + j < n;
        const S* from = static_cast<const S*>(w.data) + (inside ? first + j : 0) * w.stride;
        const C s = !inside ? C(0) : scale ? scale[first + j] : C(1);
        for (int64_t kk = k0; kk < end; kk += kLane) {
          const int64_t count = end - kk < kLane ? end - kk : kLane;
          Vec<C> v = count == kLane ? Storage<C, S>::load(from + kk) : load_first<C, S>(from + kk, count);
          v = inside ? v * s : Vec<C>{};
          for (int64_t i = 0; i < count; ++i) panel[(kk + i) * kTileCols<C> + j] = v[i];
        }
      }
    }
  });
}

// Column j of the panel is column `first + j` of w [k, n]; row kk of the panel is times scale[kk].
template <typename C>
void pack_rows(const Rows& w, int64_t first, int64_t n, int64_t k, const Same<C>* scale, C* panel) {
  with_storage<C>(w.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    for (int64_t kk = 0; kk < k; ++kk) {
      const S* from = static_cast<const S*>(w.data) + kk * w.stride + first;
      C* to = panel + kk * kTileCols<C>;
      for (int64_t j = 0; j < kTileCols<C>; j += kLanes<C>) {
        const int64_t left = n - first - j;
        Vec<C> v = {};
        if (left >= kLanes<C>) {
          v = Storage<C, S>::load(from + j);
        } else if (left > 0) {
          v = load_first<C, S>(from + j, left);
        }
        Storage<C, C>::store(to + j, scale ? v * scale[kk] : v);
      }
    }
  });
}

// The rows of thread `index` of `count`: contiguous, whole tiles.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t n, int index, int count) {
  const int64_t tiles = (n + kTileRows - 1) / kTileRows;
  const auto at = [&](int64_t i) {
    const int64_t row = tiles * i / count * kTileRows;
    return row < n ? row : n;
  };
  return {at(index), at(index + 1)};
}

}  // namespace petl::PETL_ISA
