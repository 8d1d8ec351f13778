// The adapter site: y = norm(hidden + residual + s up(act(down(x)))). A block of the sum lives in L2 from its first term
// to the writing of y, and the gradient of one from the reading of g to the writing of dx.
#include <initializer_list>

#include "bottleneck.h"
#include "norm.h"
#include "pages.h"

namespace petl::PETL_ISA {
namespace {

// sum[i, :] = a[row + i, :] + b[row + i, :], of which either may be absent.
template <typename C, typename T>
void add_terms(const Rows& a, const Rows& b, int64_t row, int64_t rows, int64_t d, C* sum, int64_t ld) {
  if (!a && !b) return std::memset(sum, 0, sizeof(C) * static_cast<size_t>(rows * ld)), void();
  if (!a || !b) return widen(a ? a : b, row, rows, d, sum, ld);
  for (int64_t i = 0; i < rows; ++i) {
    const T *from_a = at<const T>(a, row + i), *from_b = at<const T>(b, row + i);
    for_columns<C>(d, [&](int64_t c, auto lanes) {
      store<C>(sum + i * ld + c, load<C>(from_a + c, lanes) + load<C>(from_b + c, lanes), lanes);
    });
  }
}

// y, the normalised rows where they are kept, and the statistics of a block of the finished sum.
template <typename C, typename T, bool kStore>
void normalise(const AdapterNormForward& call, int64_t row, int64_t rows, const C* weight, const C* bias, const C* sum,
               int64_t ld) {
  const Rows &out = call.adapter.y, &kept = call.normal;
  const int64_t d = call.adapter.d_out;
  for (int64_t i = row; i < row + rows; ++i, sum += ld) {
    const Normal<C> normal = statistics(sum, d, call.norm.eps, call.norm.rms);
    T *y = at<T>(out, i), *store_to = at<T>(kept, i);
    for_columns<C>(d, [&](int64_t c, auto lanes) {
      const Vec<C> xh = normal(load<C>(sum + c, lanes));
      if constexpr (kStore) store<C>(store_to + c, xh, lanes);
      store<C>(y + c, xh * load_raw<Vec<C>>(weight + c) + load_raw<Vec<C>>(bias + c), lanes);
    });
    if (call.norm.mean) static_cast<C*>(call.norm.mean.data)[i] = normal.mean + normal.missing;
    if (call.norm.rstd) static_cast<C*>(call.norm.rstd.data)[i] = normal.rstd;
  }
}

template <typename C, typename P, typename T>
void forward(const AdapterNormForward& call) {
  const BottleneckForward& f = call.adapter;
  const int64_t d = f.d_out, block = block_rows(d), ld = scratch_stride<C>(d), padded = round_up(d, kTileCols<C>);
  const int64_t sum_size = block * ld, x_size = block * operand_stride<P>(f.d_in);
  const int threads = useful_threads(f.threads, f.n, 2 * f.n * d * f.r);
  Bottleneck<C, P> bottleneck(f, block, threads);
  using W = Workspace;
  Workspace work(bottleneck.bytes() + 2 * W::bytes<C>(padded) + W::bytes<C>(threads * sum_size) +
                 W::bytes<P>(threads * x_size));
  bottleneck.take(work);
  C *weight = work.take<C>(padded), *bias = work.take<C>(padded), *sums = work.take<C>(threads * sum_size);
  P* x_tiles = work.take<P>(threads * x_size);
  fill_parameter(call.norm.weight, d, C(1), weight);
  fill_parameter(call.norm.bias, d, C(0), bias);
  for (const Rows* out : {&f.y, &call.normal}) {
    if (*out) advise_huge_pages(out->data, f.n * out->stride * element_bytes(out->dtype));
  }

#pragma omp parallel num_threads(threads)
  {
    bottleneck.pack();
    const int me = omp_get_thread_num();
    C* sum = sums + me * sum_size;
    for_blocks(f.n, block, [&](int64_t row, int64_t rows, bool) {
      add_terms<C, T>(call.hidden, f.residual, row, rows, d, sum, ld);
      const Operand<P> x = operand(f.x, row, rows, f.d_in, x_tiles + me * x_size);
      bottleneck.template project<C>(me, row, rows, x, sum, ld, {sum, ld});
      if (call.normal) {
        normalise<C, T, true>(call, row, rows, weight, bias, sum, ld);
      } else {
        normalise<C, T, false>(call, row, rows, weight, bias, sum, ld);
      }
    });
  }
}

// The gradient of the sum from that of y, row by row: with xh the normalised row and gw = g weight,
// du = rstd (gw - mean(gw) - xh mean(gw xh)), of RMSNorm without the second term; dweight += g xh, dbias += g.
template <typename C, typename P, typename T>
void differentiate_norm(const AdapterNormBackward& call, int64_t row, int64_t rows, const C* weight, P* du, int64_t ld,
                        C* dweight, C* dbias) {
  const int64_t d = call.adapter.d_out;
  const C size = static_cast<C>(d);
  const bool parameters = call.dweight || call.dbias;
  for (int64_t i = row; i < row + rows; ++i, du += ld) {
    const T *from = at<const T>(call.adapter.g, i), *normal = at<const T>(call.normal, i);
    T* dsum = call.dsum ? at<T>(call.dsum, i) : nullptr;
    const C rstd = static_cast<const C*>(call.norm.rstd.data)[i];
    C totals[2];
    sum_columns<C, 2>(d, totals, [&](int64_t c, auto lanes, Vec<C>* sums) {
      prefetch_ahead(from + c);
      prefetch_ahead(normal + c);
      const Vec<C> gv = load<C>(from + c, lanes), xh = load<C>(normal + c, lanes), gw = gv * load_raw<Vec<C>>(weight + c);
      sums[0] += gw;
      sums[1] += gw * xh;
      if (!parameters) return;
      Storage<C, C>::store(dweight + c, load_raw<Vec<C>>(dweight + c) + gv * xh);
      Storage<C, C>::store(dbias + c, load_raw<Vec<C>>(dbias + c) + gv);
    });
    const C offset = call.norm.rms ? C(0) : totals[0] / size * rstd, slope = totals[1] / size * rstd;
    for_columns<C>(d, [&](int64_t c, auto lanes) {
      const Vec<C> gw = load<C>(from + c, lanes) * load_raw<Vec<C>>(weight + c);
      const Vec<C> value = gw * rstd - (load<C>(normal + c, lanes) * slope + offset);
      store<C>(elements(du) + c, value, lanes);
      if (dsum) store<C>(dsum + c, value, lanes);
    });
    end_row<P>(elements(du), d);
  }
}

// dx of a block = dz w_down, and du beside it where x was a term of the sum. `tile` has room for it.
template <typename C, typename P>
void input_gradient(const BottleneckBackward& b, const BottleneckGradients<C, P>& gradients, int me, int64_t row,
                    int64_t rows, P* du, int64_t ld, C* tile) {
  using E = Element<P>;
  const Operand<E> add{b.add_g ? elements(du) : nullptr, kPerStep<P> * ld};
  if (element_bytes(b.dx.dtype) == sizeof(E)) {
    gradients.input_gradient(me, rows, at<E>(b.dx, row), b.dx.stride, add);
  } else if constexpr (std::is_same_v<C, P>) {  // what is computed in floats but not stored so
    const int64_t ldt = scratch_stride<C>(b.d_in);
    gradients.input_gradient(me, rows, tile, ldt, add);
    narrow(tile, ldt, rows, b.d_in, b.dx, row);
  }
}

template <typename C, typename P, typename T>
void backward(const AdapterNormBackward& call) {
  const BottleneckBackward& b = call.adapter;
  const int64_t d = b.d_out, block = block_rows(d), ld = operand_stride<P>(d), padded = round_up(d, kTileCols<C>);
  const int64_t du_size = block * ld, tiles_size = du_size + block * scratch_stride<P>(b.d_in);
  const int threads = useful_threads(b.threads, b.n, 5 * b.n * d * b.r);
  const bool down = static_cast<bool>(b.dw_down), parameters = call.dweight || call.dbias;
  BottleneckGradients<C, P> gradients(b, down, b.dx || down || b.db_down, block, threads);
  using W = Workspace;
  Workspace work(gradients.bytes() + W::bytes<C>(padded) + W::bytes<P>(threads * tiles_size) +
                 W::bytes<C>(threads * 2 * padded) + W::bytes<double>(threads * 2 * padded));
  gradients.take(work);
  C *weight = work.take<C>(padded), *all_sums = work.take<C>(threads * 2 * padded);
  P* tiles = work.take<P>(threads * tiles_size);
  double* totals = work.take<double>(threads * 2 * padded);
  std::memset(all_sums, 0, sizeof(C) * static_cast<size_t>(threads * 2 * padded));
  std::memset(totals, 0, sizeof(double) * static_cast<size_t>(threads * 2 * padded));
  fill_parameter(call.norm.weight, d, C(1), weight);
  for (const Rows* out : {&b.dx, &call.dsum}) {
    if (*out) advise_huge_pages(out->data, b.n * out->stride * element_bytes(out->dtype));
  }

#pragma omp parallel num_threads(threads)
  {
    gradients.pack();
    const int me = omp_get_thread_num();
    P *du = tiles + me * tiles_size, *x_tile = du + du_size;
    C* sums = all_sums + me * 2 * padded;
    const bool any = for_blocks(b.n, block, [&](int64_t row, int64_t rows, bool first) {
      differentiate_norm<C, P, T>(call, row, rows, weight, du, ld, sums, sums + padded);
      if (parameters) flush_sums(sums, totals + me * 2 * padded, 2 * padded);
      gradients.add_up(me, row, rows, first, {du, ld});
      if (down) gradients.add_down(me, rows, first, operand(b.x, row, rows, b.d_in, x_tile));
      if (b.dx) input_gradient(b, gradients, me, row, rows, du, ld, reinterpret_cast<C*>(x_tile));
    });
    if (!any) gradients.clear(me);
#pragma omp barrier
    gradients.finish_up(me);
    gradients.finish_down([&](int64_t k, const C* row, C) {
      if (down) narrow(row, b.d_in, 1, b.d_in, b.dw_down, k);
    });
  }
  gradients.finish();
  if (!parameters) return;
  sum_partials(totals, 2 * padded, threads, 2 * padded, totals);
  for (int64_t c = 0; c < 2 * padded; ++c) all_sums[c] = static_cast<C>(totals[c]);
  if (call.dweight) narrow(all_sums, padded, 1, d, call.dweight, 0);
  if (call.dbias) narrow(all_sums + padded, padded, 1, d, call.dbias, 0);
}

}  // namespace

void adapter_norm_forward(const AdapterNormForward& f) {
  const BottleneckForward& a = f.adapter;
  if (a.y.dtype == DType::kFloat64) return forward<double, double, double>(f);
#if defined(__AVX512BF16__)
  if (are_bf16({a.x, a.y})) return forward<float, Pair, bf16>(f);
  if (are_bf16({a.x}) && a.y.dtype == DType::kFloat32) return forward<float, Pair, float>(f);
#endif
  with_storage<float>(a.y.dtype, [&](auto* y) { forward<float, float, std::remove_pointer_t<decltype(y)>>(f); });
}

void adapter_norm_backward(const AdapterNormBackward& b) {
  const BottleneckBackward& a = b.adapter;
  if (a.g.dtype == DType::kFloat64) return backward<double, double, double>(b);
#if defined(__AVX512BF16__)
  if (are_bf16({a.x, a.z, a.dx, a.g})) return backward<float, Pair, bf16>(b);
  if (are_bf16({a.x, a.z, a.dx}) && a.g.dtype == DType::kFloat32) return backward<float, Pair, float>(b);
#endif
  with_storage<float>(a.g.dtype, [&](auto* g) { backward<float, float, std::remove_pointer_t<decltype(g)>>(b); });
}

}  // namespace petl::PETL_ISA
