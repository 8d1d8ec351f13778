// The few functions that GCC compiles OpenMP to, on threads that ThreadSanitizer can follow: it does not see how libgomp
// synchronises, so that every barrier would be a race to it, or none. Linked into the tests it takes libgomp's place.
//
// Nothing here orders memory beyond what OpenMP promises, or races would hide behind it: a team starts, meets at barriers,
// and ends. The counter of `single` is relaxed. Two barriers take turns, because ThreadSanitizer orders whoever leaves one
// late after all that others did before they came to it again.
#include <pthread.h>

#include <atomic>
#include <thread>
#include <vector>

namespace {

struct Team {
  explicit Team(unsigned size) : size(size), singles(0) {
    for (pthread_barrier_t& barrier : barriers) pthread_barrier_init(&barrier, nullptr, size);
  }
  ~Team() {
    for (pthread_barrier_t& barrier : barriers) pthread_barrier_destroy(&barrier);
  }

  unsigned size;
  std::atomic<int> singles;  // how many of them somebody has begun
  pthread_barrier_t barriers[2];
};

struct Member {
  Team* team = nullptr;
  int number = 0, singles = 0, barriers = 0;  // how many of them this thread has come to
};
thread_local Member me;

}  // namespace

extern "C" {

int omp_get_thread_num() { return me.number; }
int omp_get_num_threads() { return me.team ? static_cast<int>(me.team->size) : 1; }

void GOMP_barrier() { pthread_barrier_wait(&me.team->barriers[me.barriers++ % 2]); }

bool GOMP_single_start() {
  int before = me.singles++;
  return me.team->singles.compare_exchange_strong(before, me.singles, std::memory_order_relaxed);
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team team(threads);
  const auto run = [&](int number) {
    me = {&team, number};
    body(data);
    me = {};
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(run, static_cast<int>(i));
  run(0);
  for (std::thread& t : others) t.join();
}

}  // extern "C"
