// The functions of cuda/ptx_sm90.h for a CPU: mbarriers, TMA, wgmma, clusters, and the two proxies that see shared memory.
// What happens behind a thread's back happens here as late as it may, and shows at once that it has begun:
//   - TMA fills its tile with NaN when it is asked, and with the data when no thread can go on without (no sooner); a phase
//     whose announced bytes are not those that come is never over;
//   - wgmma takes its accumulators away (NaN) and gives them back at the wait for their group. Its operands, decoded from
//     the descriptors by the PTX manual's canonical layouts, must be the same at its start and at its end;
//   - a TMA store reads its tile at the wait for it, which may not be missing;
//   - async readers have a view of shared memory of their own. What a thread stores arrives there at that thread's
//     `fence_async`, whoever else fences.
// A wgmma whose accumulators were not fenced, an mbarrier that nobody made ready and work that is never waited for fail.
#pragma once

#include "cuda_async.h"

namespace petl::cuda {

// --- threads -------------------------------------------------------------------------------------------------------
inline unsigned char* shared_memory_1024() { return shared_memory(); }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(emulator::shared_offset(emulator::current_block(), pointer)) + emulator::kSharedBegins;
}
inline void sync_threads(int id, int count) {
  emulator::meet(emulator::async_block().named[id], static_cast<unsigned>(count), -1, nullptr, {});
}
inline void fence_async() {
  emulator::note_writes();
  for (const emulator::Written& part : emulator::async_fiber().written) {
    const std::vector<unsigned char>& shared = emulator::machine.blocks[part.block].shared;
    std::memcpy(&emulator::async_blocks[part.block].seen[part.begin], &shared[part.begin], part.end - part.begin);
  }
  emulator::async_fiber().written.clear();
}
inline void fence_global() {}
inline unsigned exchange(unsigned* at, unsigned value) { return std::exchange(*at, value); }

// --- mbarriers -----------------------------------------------------------------------------------------------------
inline void barrier_init(uint64_t* barrier, int arrivals) {
  if (shared_address(barrier) % 8) emulator::fail("an mbarrier that is not on 8 bytes");
  emulator::Mbarrier& created = emulator::async_block().barriers[barrier];
  created.arrivals = created.missing = arrivals;
}
inline void barriers_ready() {
  for (auto& [key, barrier] : emulator::async_block().barriers) barrier.ready = true;
  fence_async();
}
inline void barrier_arrive_expecting(uint64_t* at, int bytes) {
  emulator::Mbarrier& barrier = emulator::mbarrier(at);
  if (barrier.missing == 0) emulator::fail("more threads arrive at an mbarrier than it is for");
  barrier.expected += bytes, --barrier.missing;
  if (barrier.loads.empty()) emulator::complete(emulator::current_block(), barrier);
}
inline void barrier_arrive(uint64_t* at) { barrier_arrive_expecting(at, 0); }
inline void barrier_wait(uint64_t* at, int parity) {
  const emulator::Mbarrier& barrier = emulator::mbarrier(at);
  while ((barrier.phase & 1) == static_cast<unsigned>(parity)) emulator::give_way(barrier.phase, barrier.phase);
}

// --- TMA -----------------------------------------------------------------------------------------------------------
inline void load_box(void* tile, const TensorMap& map, uint64_t* barrier, int64_t row, int col) {
  if (shared_address(tile) % 1024) emulator::fail("a tile that is not on 1024 bytes");
  emulator::note_writes();
  const emulator::Load load{&map, static_cast<unsigned char*>(tile), row, col, emulator::loads_asked++};
  emulator::deliver(emulator::current_block(), load, false);
  emulator::mbarrier(barrier).loads.push_back(load);
}
inline void store_box(const TensorMap& map, const void* tile, int64_t row, int col) {
  if (shared_address(tile) % 1024) emulator::fail("a tile that is not on 1024 bytes");
  emulator::AsyncFiber& fiber = emulator::async_fiber();
  fiber.stores.push_back({&map, static_cast<const unsigned char*>(tile), row, col, fiber.store_groups});
}
inline void store_commit() { ++emulator::async_fiber().store_groups; }
template <int kPending>
void store_wait() {
  emulator::AsyncFiber& fiber = emulator::async_fiber();
  std::vector<emulator::Store> later;
  for (const emulator::Store& store : fiber.stores) {
    if (store.group >= fiber.store_groups - kPending) {
      later.push_back(store);
    } else {
      emulator::write_back(emulator::current_block(), store);
    }
  }
  fiber.stores = later;
}

// --- wgmma ---------------------------------------------------------------------------------------------------------
inline void wgmma_fence() { emulator::async_fiber().fenced = true; }
inline void wgmma_commit() { ++emulator::async_fiber().groups; }
template <int kPending>
void wgmma_wait() {
  emulator::Meeting& meeting = emulator::async_block().warpgroups[threadIdx.x / kWarpgroup];
  emulator::meet(meeting, kWarpgroup, -1, emulator::retire<kPending>, {});
  emulator::async_fiber().fenced = false;
}
template <typename T, int kTransposedA, int kTransposedB>
void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  emulator::issue(d, {a, b, kTransposedA != 0, kTransposedB != 0, false, add, {}, element_in<T>, nullptr, 0, nullptr});
}
template <typename T>
void wgmma_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulator::issue(d, {0, b, false, false, true, add, {a[0], a[1], a[2], a[3]}, element_in<T>, nullptr, 0, nullptr});
}

// --- clusters ------------------------------------------------------------------------------------------------------
inline int cluster_rank() { return static_cast<int>(emulator::current_block()); }
inline void cluster_arrive() {
  emulator::AsyncFiber& fiber = emulator::async_fiber();
  if (std::exchange(fiber.arrived, true)) emulator::fail("a thread arrived twice at the cluster's barrier");
  fiber.round = emulator::cluster_meeting.round;
  if (++emulator::cluster_meeting.arrived < emulator::async_fibers.size()) return;
  emulator::cluster_meeting.arrived = 0;
  ++emulator::cluster_meeting.round;
}
inline void cluster_wait() {
  emulator::AsyncFiber& fiber = emulator::async_fiber();
  if (!std::exchange(fiber.arrived, false)) emulator::fail("a thread waits at the cluster's barrier without having arrived");
  if (emulator::cluster_meeting.round == fiber.round) emulator::give_way(emulator::cluster_meeting.round, fiber.round);
}
inline unsigned char* remote(const void* pointer, int rank) {
  const size_t offset = emulator::shared_offset(emulator::current_block(), pointer);
  return emulator::machine.blocks.at(static_cast<size_t>(rank)).shared.data() + offset;
}
inline Pair load_remote(const float* pointer, int rank) {
  Pair pair;
  std::memcpy(&pair, remote(pointer, rank), sizeof pair);
  return pair;
}
inline void store_remote(void* pointer, int rank, uint32_t bits) {
  emulator::note_writes();
  const size_t offset = emulator::shared_offset(emulator::current_block(), pointer), block = static_cast<size_t>(rank);
  std::memcpy(remote(pointer, rank), &bits, 4);
  std::memcpy(&emulator::async_blocks[block].before[offset], &bits, 4);
  emulator::async_fiber().written.push_back({block, offset, offset + 4});
}

// --- the host's side -----------------------------------------------------------------------------------------------
inline TensorMap tensor_map(const Rows& m, int64_t rows, int64_t cols) {
  if (reinterpret_cast<uintptr_t>(m.data) % 16 || (rows > 1 && m.stride * 2 % 16)) emulator::fail("a matrix TMA cannot take");
  return {static_cast<unsigned char*>(m.data), rows, cols, m.stride};
}
template <typename Arguments>
int64_t clusters_at_once(void (*)(Arguments), int cluster, int, int64_t, int processors) {
  return processors / cluster;
}
inline void zero_async(void* data, int64_t bytes, void*) { std::memset(data, 0, static_cast<size_t>(bytes)); }

template <typename Arguments>
void launch_clusters(void (*kernel)(Arguments), int64_t blocks, int cluster, int threads, int64_t shared_bytes, void*,
                     const Arguments& arguments) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments* arguments;
  } call{kernel, &arguments};
  emulator::machine.hooks = &emulator::kAsyncHooks;
  emulator::run_grid(
      dim3(static_cast<unsigned>(blocks)), threads, static_cast<size_t>(shared_bytes),
      [](void* given) {
        const auto* c = static_cast<Call*>(given);
        c->kernel(*c->arguments);
      },
      &call, static_cast<unsigned>(cluster));
  emulator::machine.hooks = nullptr;
}

}  // namespace petl::cuda
