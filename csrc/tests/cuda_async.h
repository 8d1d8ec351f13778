// What a device of sm_90a does behind a thread's back, for cuda_emulator_sm90.h: two proxies that see shared memory, mbarriers,
// TMA, wgmma.
#pragma once

#include <array>
#include <map>
#include <utility>

#include "cuda_emulator.h"

namespace petl::cuda {

// What cuTensorMapEncodeTiled packs.
struct TensorMap {
  unsigned char* data;
  int64_t rows, cols, stride;  // in elements
};

namespace emulator {

constexpr uint32_t kSharedBegins = 1024;  // in a block's window; on a GPU the first KiB is the system's

struct Load {
  const TensorMap* map;
  unsigned char* tile;
  int64_t row, col, number;
};
struct Mbarrier {
  int arrivals = 0, missing = 0;
  int64_t expected = 0;
  unsigned phase = 0;
  bool ready = false;
  std::vector<Load> loads;
};
struct AsyncBlock {
  std::vector<unsigned char> seen, before;  // by async readers; by all, when a fiber last stopped
  std::map<const void*, Mbarrier> barriers;
  Meeting named[16], warpgroups[8];
};

using Operand = std::array<std::array<float, 16>, 64>;  // of m or n and k
struct Wgmma {
  uint64_t a, b;
  bool transposed_a, transposed_b, a_in_registers, add;
  uint32_t registers[4];
  float (*element)(uint32_t, int);
  float* sums;
  int group;
  std::shared_ptr<std::array<Operand, 2>> at_start;  // kept by the first thread of the warpgroup
};
struct Store {
  const TensorMap* map;
  const unsigned char* tile;
  int64_t row, col;
  int group;
};
struct Written {
  size_t block, begin, end;
};
struct AsyncFiber {
  std::vector<Wgmma> products;
  std::map<float*, std::array<float, 32>> sums;  // which the hardware has
  std::vector<Store> stores;
  std::vector<Written> written;  // and not fenced yet
  int groups = 0, store_groups = 0;
  unsigned round = 0;  // of the cluster's barrier, at which this thread has arrived
  bool fenced = false, arrived = false;
};
inline std::vector<AsyncBlock> async_blocks;
inline std::vector<AsyncFiber> async_fibers;
inline Meeting cluster_meeting;
inline int64_t loads_asked = 0, times_stuck = 0;

inline size_t current_block() { return static_cast<size_t>(machine.current / machine.threads); }
inline AsyncBlock& async_block() { return async_blocks[current_block()]; }
inline AsyncFiber& async_fiber() { return async_fibers[static_cast<size_t>(machine.current)]; }

// --- the proxies ---------------------------------------------------------------------------------------------------
// Notes what the current fiber has written since fibers last changed.
inline void note_writes() {
  std::vector<unsigned char>& now = machine.block().shared;
  std::vector<unsigned char>& before = async_block().before;
  for (size_t line = 0; line < now.size(); line += 256) {
    const size_t end = std::min(line + 256, now.size());
    if (std::memcmp(&now[line], &before[line], end - line) == 0) continue;
    for (size_t i = line; i < end; ++i) {
      if (now[i] == before[i]) continue;
      const size_t begin = i;
      while (i < end && now[i] != before[i]) ++i;
      async_fiber().written.push_back({current_block(), begin, i});
    }
    std::copy(now.begin() + static_cast<std::ptrdiff_t>(line), now.begin() + static_cast<std::ptrdiff_t>(end),
              before.begin() + static_cast<std::ptrdiff_t>(line));
  }
}
// A write by the async proxy, which all see.
inline void write_async(size_t block, size_t at, const unsigned char* from, size_t bytes) {
  for (std::vector<unsigned char>* memory :
       {&machine.blocks[block].shared, &async_blocks[block].seen, &async_blocks[block].before}) {
    if (at + bytes > memory->size()) fail("TMA beyond shared memory");
    std::memcpy(memory->data() + at, from, bytes);
  }
}
inline size_t shared_offset(size_t block, const void* pointer) {
  const auto at = static_cast<size_t>(static_cast<const unsigned char*>(pointer) - machine.blocks[block].shared.data());
  if (at >= machine.blocks[block].shared.size()) fail("an address that is not in shared memory");
  return at;
}

// Of the modes of a descriptor: 0 none, 1 128 bytes, 2 64, 3 32.
inline uint32_t swizzled(uint32_t address, int mode) {
  const uint32_t bits = mode == 1 ? 7u : mode == 2 ? 3u : mode == 3 ? 1u : 0u;
  return address ^ ((address >> 7 & bits) << 4);
}

// --- TMA -----------------------------------------------------------------------------------------------------------
// Chunk c of row i of a box, in a tile of 128-byte swizzle.
inline size_t chunk_at(size_t tile, int i, int c) {
  const auto plain = static_cast<uint32_t>(tile) + kSharedBegins + static_cast<uint32_t>(128 * i + 16 * c);
  return swizzled(plain, 1) - kSharedBegins;
}
inline void deliver(size_t block, const Load& load, bool arrived) {
  const size_t tile = shared_offset(block, load.tile);
  for (int i = 0; i < kMapRows; ++i) {
    for (int c = 0; c < 8; ++c) {
      uint16_t chunk[8];
      for (int e = 0; e < 8; ++e) {
        const int64_t row = load.row + i, col = load.col + 8 * c + e;
        chunk[e] = 0;
        if (!arrived) {
          chunk[e] = 0xffff;
        } else if (row >= 0 && row < load.map->rows && col >= 0 && col < load.map->cols) {
          std::memcpy(&chunk[e], load.map->data + 2 * (row * load.map->stride + col), 2);
        }
      }
      write_async(block, chunk_at(tile, i, c), reinterpret_cast<const unsigned char*>(chunk), 16);
    }
  }
}
inline void write_back(size_t block, const Store& store) {
  const size_t tile = shared_offset(block, store.tile);
  for (int i = 0; i < kMapRows; ++i) {
    for (int e = 0; e < 64; ++e) {
      const int64_t row = store.row + i, col = store.col + e;
      if (row >= store.map->rows || col >= store.map->cols) continue;
      std::memcpy(store.map->data + 2 * (row * store.map->stride + col),
                  &async_blocks[block].seen[chunk_at(tile, i, e / 8) + 2 * static_cast<size_t>(e % 8)], 2);
    }
  }
}

inline Mbarrier& mbarrier(uint64_t* barrier) {
  const auto found = async_block().barriers.find(barrier);
  if (found == async_block().barriers.end() || !found->second.ready) fail("an mbarrier that is not ready");
  return found->second;
}
inline bool complete(size_t block, Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.expected != static_cast<int64_t>(barrier.loads.size()) * kMapBytes) return false;
  for (const Load& load : barrier.loads) deliver(block, load, true);
  barrier.loads.clear();
  barrier.expected = 0, barrier.missing = barrier.arrivals;
  ++barrier.phase;
  return true;
}

// --- wgmma ---------------------------------------------------------------------------------------------------------
// PTX ISA, "Canonical Layouts" of wgmma, elements of 16 bits: the offset of element (mn, k) before swizzling.
inline uint32_t canonical(int mn, int k, bool transposed, int mode, uint32_t leading, uint32_t stride) {
  const int width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;  // bytes of a row of the pattern
  const auto at = [](int i, uint32_t bytes) { return static_cast<uint32_t>(i) * bytes; };
  if (!transposed) {
    if (mode == 0) return at(mn % 8, 16) + at(mn / 8, stride) + at(k / 8, leading) + at(k % 8, 2);
    return at(mn % 8, static_cast<uint32_t>(width)) + at(mn / 8, stride) + at(k, 2);
  }
  if (mode == 0) return at(mn % 8, 2) + at(mn / 8, stride) + at(k % 8, 16) + at(k / 8, leading);
  return at(mn % (width / 2), 2) + at(mn / (width / 2), leading) + at(k % 8, static_cast<uint32_t>(width)) + at(k / 8, stride);
}
inline Operand decode(uint64_t descriptor, bool transposed, float (*element)(uint32_t, int)) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  if (descriptor >> 49 & 7) fail("a descriptor with a base offset: the emulator's tiles begin on 1024 bytes");
  const std::vector<unsigned char>& seen = async_block().seen;
  const int mode = static_cast<int>(descriptor >> 62);
  Operand out;
  for (int mn = 0; mn < 64; ++mn) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t at = swizzled(field(0) + canonical(mn, k, transposed, mode, field(16), field(32)), mode) - kSharedBegins;
      if (at + 2 > seen.size()) fail("a descriptor that points beyond shared memory");
      uint16_t bits;
      std::memcpy(&bits, &seen[at], 2);
      out[static_cast<size_t>(mn)][static_cast<size_t>(k)] = element(bits, 0);
    }
  }
  return out;
}
inline bool same(const Operand& a, const Operand& b) { return std::memcmp(&a, &b, sizeof a) == 0; }

// One product of a warpgroup; threads first.. hold its registers ("Register Fragments" of wgmma.m64nNk16).
inline void compute(size_t first, size_t which) {
  const Wgmma& lead = async_fibers[first].products[which];
  Operand a;
  if (!lead.a_in_registers) a = decode(lead.a, lead.transposed_a, lead.element);
  const Operand b = decode(lead.b, lead.transposed_b, lead.element);
  if (!same(b, (*lead.at_start)[1]) || (!lead.a_in_registers && !same(a, (*lead.at_start)[0]))) {
    fail("an operand of wgmma changed before the wait for its group");
  }
  for (size_t t = 0; t < kWarpgroup; ++t) {
    const Wgmma& op = async_fibers[first + t].products[which];
    if (op.a != lead.a || op.b != lead.b || op.element != lead.element || op.add != lead.add) {
      fail("threads of a warpgroup issued different products");
    }
    for (size_t i = 0; op.a_in_registers && i < 4; ++i) {
      for (size_t e = 0; e < 2; ++e) {
        a[t / 32 * 16 + t % 32 / 4 + i % 2 * 8][t % 4 * 2 + e + i / 2 * 8] = op.element(op.registers[i], static_cast<int>(e));
      }
    }
  }
  for (size_t t = 0; t < kWarpgroup; ++t) {
    std::array<float, 32>& sums = async_fibers[first + t].sums.at(async_fibers[first + t].products[which].sums);
    for (size_t i = 0; i < 32; ++i) {
      const size_t row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + t % 4 * 2 + i % 2;
      double sum = 0;
      for (size_t k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[col][k];
      sums[i] = (lead.add ? sums[i] : 0.0f) + static_cast<float>(sum);
    }
  }
}
template <int kPending>
void retire(Arrival*) {
  const size_t first = current_block() * static_cast<size_t>(machine.threads) + threadIdx.x / kWarpgroup * kWarpgroup;
  const AsyncFiber& lead = async_fibers[first];
  const size_t issued = lead.products.size();
  size_t done = 0;
  while (done < lead.products.size() && lead.products[done].group < lead.groups - kPending) compute(first, done++);
  for (size_t t = first; t < first + kWarpgroup; ++t) {
    AsyncFiber& fiber = async_fibers[t];
    if (fiber.products.size() != issued) fail("threads of a warpgroup issued different products");
    fiber.products.erase(fiber.products.begin(), fiber.products.begin() + static_cast<std::ptrdiff_t>(done));
    for (auto it = fiber.sums.begin(); it != fiber.sums.end();) {
      const bool wanted = std::any_of(fiber.products.begin(), fiber.products.end(),
                                      [&](const Wgmma& op) { return op.sums == it->first; });
      if (!wanted) std::copy(it->second.begin(), it->second.end(), it->first);
      it = wanted ? std::next(it) : fiber.sums.erase(it);
    }
  }
}
inline void issue(float (&d)[32], Wgmma op) {
  AsyncFiber& fiber = async_fiber();
  op.sums = d, op.group = fiber.groups;
  if (fiber.sums.find(d) == fiber.sums.end()) {
    if (!fiber.fenced) fail("wgmma without a fence before it");
    std::copy(d, d + 32, fiber.sums[d].begin());
    std::fill(d, d + 32, NAN);
  }
  if (threadIdx.x % kWarpgroup == 0) {
    op.at_start = std::make_shared<std::array<Operand, 2>>();
    if (!op.a_in_registers) (*op.at_start)[0] = decode(op.a, op.transposed_a, op.element);
    (*op.at_start)[1] = decode(op.b, op.transposed_b, op.element);
  }
  fiber.products.push_back(op);
}

// --- the machine's hooks -------------------------------------------------------------------------------------------
inline void begin_async() {
  async_blocks.assign(machine.blocks.size(), {});
  async_fibers.assign(machine.blocks.size() * static_cast<size_t>(machine.threads), {});
  cluster_meeting = {};
  for (size_t b = 0; b < async_blocks.size(); ++b) async_blocks[b].seen = async_blocks[b].before = machine.blocks[b].shared;
}
// One phase, in turn of the load asked for last and first: loads come in any order.
inline bool complete_one() {
  std::map<int64_t, std::pair<size_t, Mbarrier*>> waiting;
  for (size_t b = 0; b < async_blocks.size(); ++b) {
    for (auto& [key, barrier] : async_blocks[b].barriers) {
      if (!barrier.loads.empty()) waiting[barrier.loads.front().number * (times_stuck % 2 ? 1 : -1)] = {b, &barrier};
    }
  }
  ++times_stuck;
  return std::any_of(waiting.begin(), waiting.end(),
                     [](auto& entry) { return complete(entry.second.first, *entry.second.second); });
}
inline void end_async() {
  for (const AsyncFiber& fiber : async_fibers) {
    if (!fiber.products.empty()) fail("a thread ended before its wgmma");
    if (!fiber.stores.empty()) fail("a thread ended while its TMA stores read shared memory");
  }
  for (const AsyncBlock& block : async_blocks) {
    for (const auto& [key, barrier] : block.barriers) {
      if (!barrier.loads.empty()) fail("a block ended before its TMA loads");
    }
  }
}
inline constexpr Hooks kAsyncHooks{begin_async, note_writes, complete_one, end_async};

}  // namespace emulator

}  // namespace petl::cuda
