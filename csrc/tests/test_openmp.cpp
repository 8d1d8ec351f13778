// What openmp.cpp has to show: that of these loops ThreadSanitizer reports those that race, and no other.
#include <omp.h>

#include <cstring>

#include "testing.h"

namespace {

constexpr int kThreads = 3;

// Partial sums that meet at a barrier, a `single` and a loop, as the kernels' do.
double sum(bool own_partials, bool barrier, bool meet_after_single) {
  double partials[kThreads] = {}, parts[kThreads] = {}, total = 0;
  int team = 0;
#pragma omp parallel num_threads(kThreads)
  {
#pragma omp single nowait
    team = omp_get_num_threads();
    if (meet_after_single) {
#pragma omp barrier
    }
    double& mine = partials[own_partials ? omp_get_thread_num() : 0];
    for (int i = 0; i < team; ++i) mine += 1;
    if (barrier) {
#pragma omp barrier
    }
#pragma omp for
    for (int i = 0; i < kThreads; ++i) parts[i] = partials[kThreads - 1 - i];
#pragma omp single
    for (double part : parts) total += part;
  }
  return total;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string broken = count > 1 ? arguments[1] : "nothing";
  for (int i = 0; i < 100; ++i) {
    const double total = sum(broken != "partials", broken != "barrier", broken != "single");
    expect(broken != "nothing" || total == kThreads * kThreads, text("sum ", total));
  }
  return finish();
}
