// A device on a CPU as far as threads go: the threads of a block (or of the blocks of one cluster) are fibers that run one
// after the other and give way where they wait for each other, at barriers and at what a warp does together.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define PETL_EMULATOR_ASAN 1
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, gridDim;

namespace petl::cuda {

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::printf("FAIL emulator, block (%u, %u, %u) thread %u: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, what);
  std::fflush(stdout);
  std::abort();
}

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, group;
};

// What a lane brings to something that its warp does together.
struct Arrival {
  const void* in[2];
  void* out;
};

struct Meeting {
  const void* what = nullptr;  // the function that computes it: the same for all who meet
  unsigned round = 0, arrived = 0;
  Arrival lanes[kWarp];
};

struct Fiber {
  static constexpr size_t kStack = 96 * 1024;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  bool done = false;
  const unsigned* awaited = nullptr;  // ready when this no longer holds `value`
  unsigned value = 0;
  std::vector<Copy> copies;
  int groups = 0;

  bool ready() const { return !done && (!awaited || *awaited != value); }
};

struct Counters {
  int64_t launches = 0, collisions = 0, copied_bytes = 0;
};

struct Block {
  dim3 index;
  std::vector<Meeting> warps;
  Meeting barrier;
  std::vector<unsigned char> shared;
};

// What cuda_emulator_sm90.h adds: when blocks begin and end, when a fiber has run a while, and when none can.
struct Hooks {
  void (*begin)();
  void (*ran)();
  bool (*stuck)();
  void (*end)();
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;  // of one cluster; they run together
  const Hooks* hooks = nullptr;
  ucontext_t scheduler;
  int current = 0, threads = 0;  // the fiber that runs, and how many a block has
  bool last_first = false;       // the order of blocks in x, or of their clusters
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  Counters counters;
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;

  Block& block() { return blocks[static_cast<size_t>(current / threads)]; }
};
inline Machine machine;

inline void switch_to(ucontext_t& from, ucontext_t& to, [[maybe_unused]] const void* stack,
                      [[maybe_unused]] size_t bytes, [[maybe_unused]] bool last = false) {
#ifdef PETL_EMULATOR_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, stack, bytes);
  swapcontext(&from, &to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  swapcontext(&from, &to);
#endif
}

inline void give_way(const unsigned& word, unsigned value) {
  Fiber& fiber = machine.fibers[static_cast<size_t>(machine.current)];
  fiber.awaited = &word, fiber.value = value;
  switch_to(fiber.context, machine.scheduler, machine.scheduler_stack, machine.scheduler_bytes);
  fiber.awaited = nullptr;
}

inline void run_fiber() {
#ifdef PETL_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_bytes);
#endif
  machine.body(machine.arguments);
  Fiber& fiber = machine.fibers[static_cast<size_t>(machine.current)];
  fiber.done = true;
  switch_to(fiber.context, machine.scheduler, machine.scheduler_stack, machine.scheduler_bytes, true);
}

// All who meet wait for the last, who computes for all.
inline void meet(Meeting& meeting, unsigned count, int seat, void (*compute)(Arrival*), Arrival arrival) {
  const void* what = reinterpret_cast<const void*>(compute);
  if (meeting.arrived && meeting.what != what) fail("lanes of one warp met in different instructions");
  meeting.what = what;
  if (seat >= 0) meeting.lanes[seat] = arrival;
  if (++meeting.arrived < count) {
    give_way(meeting.round, meeting.round);
    return;
  }
  if (compute) compute(meeting.lanes);
  meeting.arrived = 0;
  ++meeting.round;
}

inline void meet_warp(void (*compute)(Arrival*), const void* in, const void* in2, void* out) {
  Meeting& warp = machine.block().warps[threadIdx.x / kWarp];
  meet(warp, kWarp, machine.current % kWarp, compute, {{in, in2}, out});
}

inline void restart(Fiber& fiber) {
  fiber.done = false, fiber.awaited = nullptr, fiber.groups = 0;
  fiber.copies.clear();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = Fiber::kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

inline void run_blocks(bool backwards) {
  const int fibers = machine.threads * static_cast<int>(machine.blocks.size());
  for (int i = 0; i < fibers; ++i) restart(machine.fibers[static_cast<size_t>(i)]);
  for (int left = fibers; left > 0;) {
    bool moved = false;
    for (int i = 0; i < fibers; ++i) {
      machine.current = backwards ? fibers - 1 - i : i;
      Fiber& fiber = machine.fibers[static_cast<size_t>(machine.current)];
      if (!fiber.ready()) continue;
      moved = true;
      threadIdx.x = static_cast<unsigned>(machine.current % machine.threads);
      blockIdx = machine.block().index;
      switch_to(machine.scheduler, fiber.context, fiber.stack.get(), Fiber::kStack);
      left -= fiber.done;
      if (machine.hooks) machine.hooks->ran();
    }
    if (!moved && left > 0 && !(machine.hooks && machine.hooks->stuck())) fail("threads wait for each other for ever");
  }
}

// `cluster` blocks, neighbours in x, run together.
inline void run_grid(dim3 grid, int threads, size_t shared_bytes, void (*body)(void*), void* arguments, unsigned cluster = 1) {
  machine.threads = threads, machine.body = body, machine.arguments = arguments;
  machine.blocks.assign(cluster, {});
  const size_t fibers = cluster * static_cast<size_t>(threads);
  if (machine.fibers.size() < fibers) machine.fibers.resize(fibers);
  ++machine.counters.launches;
  gridDim = grid;
  int64_t round = 0;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += cluster) {
        for (unsigned i = 0; i < cluster; ++i) {
          Block& block = machine.blocks[i];
          block.index = {(machine.last_first ? grid.x - cluster - x : x) + i, y, z};
          block.warps.assign(static_cast<size_t>(threads / kWarp), {});
          block.barrier = {};
          block.shared = std::vector<unsigned char>(shared_bytes, 0xff);
        }
        if (machine.hooks) machine.hooks->begin();
        run_blocks(round++ % 2 == 1);
        if (machine.hooks) machine.hooks->end();
      }
    }
  }
}

}  // namespace emulator
}  // namespace petl::cuda
