// A factor for each channel, and its gradient in the pass over g and x that makes dx.
#include <omp.h>

#include "columns.h"
#include "pages.h"

namespace petl::PETL_ISA {
namespace {

// Rows added up in float32. Over 42 rows sums of 64 had 1.4 times the error that is allowed, sums of 16 at most 0.7; 64
// took 8 % less time in the L3 cache and as long beyond it.
constexpr int64_t kSumRows = 16;

template <typename X>
X* row_of(const Rows& m, int64_t row) {
  return m ? static_cast<X*>(m.data) + row * m.stride : nullptr;
}

// y = x * scale; `scale` is padded to whole vectors. Without `prefetch_ahead`, which made no difference to one operand.
template <typename C, typename X>
void forward(const ChannelScaleForward& f) {
  const int64_t padded = round_up(f.d, kLanes<C>);
  Workspace work(Workspace::bytes<C>(padded));
  C* scale = work.take<C>(padded);
  widen(f.scale, 0, 1, f.d, scale, f.d);
  advise_huge_pages(f.y.data, f.n * f.y.stride * static_cast<int64_t>(sizeof(X)));
#pragma omp parallel num_threads(streaming_threads(f.threads, f.n, f.d))
  {
    const Range range = even_share(f.n, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t row = range.begin; row < range.end; ++row) {
      const X* x = row_of<const X>(f.x, row);
      X* y = row_of<X>(f.y, row);
      for_columns<C>(f.d, [&](int64_t c, auto lanes) {
        store<C>(y + c, load<C>(x + c, lanes) * load_raw<Vec<C>>(scale + c), lanes);
      });
    }
  }
}

// sums += g x, and dx = g scale where it is wanted. A row at a time: pairs of rows, summed in registers, took 5 to 65 %
// longer (g, x and dx of 12 and 38 MB in float32).
template <typename C, typename X, bool kInput>
void backward_rows(const ChannelScaleBackward& b, Range range, const C* scale, C* sums, double* totals) {
  const int64_t padded = round_up(b.d, kLanes<C>);
  std::memset(sums, 0, sizeof(C) * static_cast<size_t>(padded));
  std::memset(totals, 0, sizeof(double) * static_cast<size_t>(padded));
  for (int64_t row = range.begin; row < range.end; ++row) {
    const X *g = row_of<const X>(b.g, row), *x = row_of<const X>(b.x, row);
    X* dx = row_of<X>(b.dx, row);
    for_columns<C>(b.d, [&](int64_t c, auto lanes) {
      prefetch_ahead(g + c);
      prefetch_ahead(x + c);
      const Vec<C> gv = load<C>(g + c, lanes);
      Storage<C, C>::store(sums + c, load_raw<Vec<C>>(sums + c) + gv * load<C>(x + c, lanes));
      if constexpr (kInput) store<C>(dx + c, gv * load_raw<Vec<C>>(scale + c), lanes);
    });
    if ((row - range.begin) % kSumRows == kSumRows - 1 || row + 1 == range.end) flush_sums(sums, totals, padded);
  }
}

template <typename C, typename X>
void backward(const ChannelScaleBackward& b) {
  const int64_t padded = round_up(b.d, kTileCols<C>);
  int threads = streaming_threads(b.threads, b.n, b.d);
  Workspace work(Workspace::bytes<C>((1 + threads) * padded) + Workspace::bytes<double>(threads * padded));
  C* scale = work.take<C>(padded);
  C* sums = work.take<C>(threads * padded);
  double* totals = work.take<double>(threads * padded);
  widen(b.scale, 0, 1, b.d, scale, b.d);
  if (b.dx) advise_huge_pages(b.dx.data, b.n * b.dx.stride * static_cast<int64_t>(sizeof(X)));
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    threads = omp_get_num_threads();  // the team may be smaller than asked for
    const int me = omp_get_thread_num();
    const auto walk = b.dx ? backward_rows<C, X, true> : backward_rows<C, X, false>;
    walk(b, even_share(b.n, me, threads), scale, sums + me * padded, totals + me * padded);
  }
  sum_partials(totals, padded, threads, b.d, totals);
  for (int64_t c = 0; c < b.d; ++c) sums[c] = static_cast<C>(totals[c]);
  narrow(sums, padded, 1, b.d, b.dscale, 0);
}

}  // namespace

void channel_scale_forward(const ChannelScaleForward& f) {
  if (f.x.dtype == DType::kFloat64) return forward<double, double>(f);
  with_storage<float>(f.x.dtype, [&](auto* x) { forward<float, std::remove_pointer_t<decltype(x)>>(f); });
}

void channel_scale_backward(const ChannelScaleBackward& b) {
  if (!b.dscale) return channel_scale_forward({b.n, b.d, b.g, b.scale, b.dx, b.threads});
  if (b.g.dtype == DType::kFloat64) return backward<double, double>(b);
  with_storage<float>(b.g.dtype, [&](auto* g) { backward<float, std::remove_pointer_t<decltype(g)>>(b); });
}

}  // namespace petl::PETL_ISA
