// First-order Taylor scores of channels: one pass over an activation and its gradient, both read once and in order.
#include <omp.h>

#include "columns.h"

namespace petl::PETL_ISA {
namespace {

// Rows added up in float32: few, because these sums are squared, which doubles their relative error. 64 took as long.
constexpr int64_t kSumRows = 8;

// What becomes of a product before it is added up.
struct Plain {
  template <typename V>
  static PETL_INLINE V map(V v) {
    return v;
  }
};
struct Absolute {
  template <typename V>
  static PETL_INLINE V map(V v) {
    return v < 0 ? -v : v;
  }
};
struct Squared {
  template <typename V>
  static PETL_INLINE V map(V v) {
    return v * v;
  }
};

template <typename C, typename A, typename G>
struct Operands {
  const A* a;
  const G* g;
  int64_t a_stride, g_stride;
};

// sums[c] += the mapped products of rows [row, row + rows), a row at a time: four rows at a time, with eight streams in
// flight, reached half the bandwidth.
template <typename C, typename Map, typename A, typename G>
void add_rows(const Operands<C, A, G>& in, int64_t row, int64_t rows, int64_t d, C* sums) {
  const int64_t whole = d / kLanes<C> * kLanes<C>, rest = d - whole;
  for (int64_t r = row; r < row + rows; ++r) {
    const A* a = in.a + r * in.a_stride;
    const G* g = in.g + r * in.g_stride;
    for (int64_t c = 0; c < whole; c += kLanes<C>) {
      prefetch_ahead(a + c);
      prefetch_ahead(g + c);
      const Vec<C> product = Map::map(Storage<C, A>::load(a + c) * Storage<C, G>::load(g + c));
      Storage<C, C>::store(sums + c, load_raw<Vec<C>>(sums + c) + product);
    }
    if (rest) {
      const Vec<C> product = Map::map(load_first<C, A>(a + whole, rest) * load_first<C, G>(g + whole, rest));
      store_first<C, C>(sums + whole, load_first<C, C>(sums + whole, rest) + product, rest);
    }
  }
}

// totals[c] += the mapped products of rows [begin, end).
template <typename C, typename Map, typename A, typename G>
void sum_rows(const Operands<C, A, G>& in, int64_t begin, int64_t end, int64_t d, C* sums, double* totals) {
  for (int64_t row = begin; row < end; row += kSumRows) {
    add_rows<C, Map>(in, row, end - row < kSumRows ? end - row : kSumRows, d, sums);
    flush_sums(sums, totals, d);
  }
}

// What one thread adds up of its share: of rows, or of samples, which are not divided.
template <typename C, typename A, typename G>
void sum_share(const ChannelImportance& call, const Operands<C, A, G>& in, Range share, C* sums, double* sample,
               double* totals) {
  const int64_t d = call.d;
  std::memset(sums, 0, sizeof(C) * static_cast<size_t>(d));
  std::memset(totals, 0, sizeof(double) * static_cast<size_t>(d));
  if (call.reduction == Reduction::kSqBatch) return sum_rows<C, Plain>(in, share.begin, share.end, d, sums, totals);
  if (call.reduction == Reduction::kAbs) return sum_rows<C, Absolute>(in, share.begin, share.end, d, sums, totals);
  if (call.sample_rows == 1) return sum_rows<C, Squared>(in, share.begin, share.end, d, sums, totals);
  for (int64_t s = share.begin; s < share.end; ++s) {
    std::memset(sample, 0, sizeof(double) * static_cast<size_t>(d));
    sum_rows<C, Plain>(in, s * call.sample_rows, (s + 1) * call.sample_rows, d, sums, sample);
    for (int64_t c = 0; c < d; ++c) totals[c] += sample[c] * sample[c];
  }
}

template <typename C, typename A, typename G>
void importance(const ChannelImportance& call) {
  const int64_t d = call.d;
  const int64_t units = call.reduction == Reduction::kSqSample ? call.n / call.sample_rows : call.n;
  int threads = streaming_threads(call.threads, call.n, d);
  if (units < threads) threads = static_cast<int>(units);
  using W = Workspace;
  // Per thread pieces of their own, so that no two threads write one cache line.
  const int64_t sums_size = W::bytes<C>(d) / static_cast<int64_t>(sizeof(C));
  const int64_t wide_size = W::bytes<double>(d) / static_cast<int64_t>(sizeof(double));
  Workspace work(W::bytes<C>(threads * sums_size) + 2 * W::bytes<double>(threads * wide_size));
  C* sums = work.take<C>(threads * sums_size);
  double* samples = work.take<double>(threads * wide_size);
  double* totals = work.take<double>(threads * wide_size);
  const Operands<C, A, G> in{static_cast<const A*>(call.activation.data), static_cast<const G*>(call.grad.data),
                             call.activation.stride, call.grad.stride};
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    threads = omp_get_num_threads();  // the team may be smaller than asked for
    const int me = omp_get_thread_num();
    sum_share<C>(call, in, even_share(units, me, threads), sums + me * sums_size, samples + me * wide_size,
                 totals + me * wide_size);
  }
  sum_partials(totals, wide_size, threads, d, totals);
  C* scores = static_cast<C*>(call.scores.data);
  const bool square = call.reduction == Reduction::kSqBatch;
  for (int64_t c = 0; c < d; ++c) scores[c] = static_cast<C>(square ? totals[c] * totals[c] : totals[c]);
}

}  // namespace

void channel_importance(const ChannelImportance& call) {
  if (call.activation.dtype == DType::kFloat64) return importance<double, double, double>(call);
  with_storage<float>(call.activation.dtype, [&](auto* a) {
    with_storage<float>(call.grad.dtype, [&](auto* g) {
      importance<float, std::remove_pointer_t<decltype(a)>, std::remove_pointer_t<decltype(g)>>(call);
    });
  });
}

}  // namespace petl::PETL_ISA
