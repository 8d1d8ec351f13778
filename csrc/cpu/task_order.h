// The rows of a batch in the order of their tasks, and which of them lie one behind the other in memory.
#pragma once

#include <vector>

#include "blocks.h"

namespace petl::PETL_ISA {

// Consecutive rows of the tensors.
struct Span {
  int64_t row, count;
};
using Spans = std::vector<Span>;

// Room for each thread's spans of a block of `most` rows: an allocation that failed among the threads would end the
// process instead of the call.
inline std::vector<Spans> spans_of(int threads, int64_t most) {
  std::vector<Spans> all(static_cast<size_t>(threads));
  for (Spans& spans : all) spans.reserve(static_cast<size_t>(most));
  return all;
}

// The rows in the order of their tasks, those of one task in their own order.
struct TaskOrder {
  int64_t rows;                 // per sample
  std::vector<int64_t> sample;  // the samples in that order
  std::vector<int64_t> first;   // the place in that order of each task's first row; then the number of all rows
  std::vector<int64_t> present;  // the tasks that have rows

  template <typename Call>
  explicit TaskOrder(const Call& c)
      : rows(c.rows), sample(static_cast<size_t>(c.samples)), first(static_cast<size_t>(c.tasks) + 1) {
    for (int64_t s = 0; s < c.samples; ++s) ++first[c.task[s] + 1];
    for (int64_t t = 0; t < c.tasks; ++t) {
      if (first[t + 1]) present.push_back(t);
      first[t + 1] += first[t];
    }
    std::vector<int64_t> next = first;
    for (int64_t s = 0; s < c.samples; ++s) sample[next[c.task[s]]++] = s;
    for (int64_t& place : first) place *= rows;
  }

  // The rows from place `at` on that lie one behind the other in the tensors too, up to place `end`.
  Span span(int64_t at, int64_t end) const {
    int64_t s = at / rows, count = rows - at % rows;
    const int64_t row = sample[s] * rows + at % rows;
    for (; at + count < end && sample[s + 1] == sample[s] + 1; ++s) count += rows;
    return {row, count < end - at ? count : end - at};
  }

  // The next block of at most `most` rows from place `at` on. A span of half a block is taken as it is, in place; of
  // shorter ones as many as make a block are gathered, since a product over a few rows does not pay for its weights.
  int64_t block(int64_t at, int64_t end, int64_t most, Spans& spans) const {
    spans.clear();
    const Span whole = span(at, end < at + 2 * most ? end : at + 2 * most);
    if (2 * whole.count >= most) {
      const int64_t parts = (whole.count + most - 1) / most, part = round_up((whole.count + parts - 1) / parts, kTileRows);
      spans.push_back({whole.row, part < whole.count ? part : whole.count});
      return spans[0].count;
    }
    const int64_t last = end < at + most ? end : at + most;
    for (int64_t place = at; place < last; place += spans.back().count) spans.push_back(span(place, last));
    return last - at;
  }

  // Calls f(index in `present`, begin, end) for the parts of a range of places that belong to one task each.
  template <typename F>
  void for_tasks(Range range, F f) const {
    for (size_t i = 0; i < present.size(); ++i) {
      const int64_t from = first[present[i]], to = first[present[i] + 1];
      const int64_t begin = from > range.begin ? from : range.begin, end = to < range.end ? to : range.end;
      if (begin < end) f(static_cast<int64_t>(i), begin, end);
    }
  }
};

}  // namespace petl::PETL_ISA
