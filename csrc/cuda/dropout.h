// Dropout without a mask, by the numbers of petl_kernels/ops/_dropout.py: those of cpu/dropout.h and of Triton.
#pragma once

#include "ptx.h"

namespace petl::cuda {

// What the kernels take; `seed` is read where they run.
struct Keep {
  const int64_t* seed;
  int32_t threshold;  // of 31 bits
  float factor;       // of what is kept: 1 where nothing is dropped
};
inline Keep keep(const Dropout& dropout) {
  if (!dropout) return {nullptr, 0, 1.0f};
  return {dropout.seed, static_cast<int32_t>(dropout.p * 2147483648.0), static_cast<float>(1 / (1 - dropout.p))};
}

// Bit w: whether element (4 group + w, column) is kept. Philox-4x32-10 (Salmon et al. 2011) of the counter
// (column, group, 0) under the key `seed`; its four words are those of four rows.
PETL_DEVICE uint32_t kept_of_four(uint64_t seed, uint32_t column, uint64_t group, int32_t threshold) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t word[4] = {column, static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(word[0]) * 0xd2511f53u;
    const uint64_t third = static_cast<uint64_t>(word[2]) * 0xcd9e8d57u;
    word[0] = static_cast<uint32_t>(third >> 32) ^ word[1] ^ key0, word[1] = static_cast<uint32_t>(third);
    word[2] = static_cast<uint32_t>(first >> 32) ^ word[3] ^ key1, word[3] = static_cast<uint32_t>(first);
    key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
  }
  uint32_t kept = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) kept |= static_cast<uint32_t>(static_cast<int32_t>(word[w] >> 1) >= threshold) << w;
  return kept;
}

}  // namespace petl::cuda
