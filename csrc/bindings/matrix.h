// What both extensions take a tensor as: petl_kernels.ops._rows makes it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../petl.h"

namespace py = pybind11;
using namespace petl;

using Matrix = std::optional<std::tuple<uintptr_t, int, int64_t>>;  // address, dtype, row stride in elements

inline Rows rows(const Matrix& m) {
  if (!m) return {};
  const auto [address, dtype, stride] = *m;
  return {reinterpret_cast<void*>(address), static_cast<DType>(dtype), stride};
}
