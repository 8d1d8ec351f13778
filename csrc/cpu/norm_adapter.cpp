// The pre-norm branch: y = residual + s up(act(down(norm(x)))). The normalised rows exist only block by block, in L2.
#include "bottleneck.h"
#include "norm.h"
#include "pages.h"

namespace petl::PETL_ISA {
namespace {

// u = norm(x) weight + bias for a block of rows, and the statistics; `scratch` has room for one row.
template <typename C, typename P>
void normalise(const NormAdapterForward& call, int64_t row, int64_t rows, const C* weight, const C* bias, C* scratch, P* u,
               int64_t ld) {
  const int64_t d = call.adapter.d_in;
  for (int64_t i = row; i < row + rows; ++i, u += ld) {
    const C* v = values(call.adapter.x, i, d, scratch);
    const Normal<C> normal = statistics(v, d, call.norm.eps, call.norm.rms);
    for_columns<C>(d, [&](int64_t c, auto lanes) {
      const Vec<C> xh = normal(load<C>(v + c, lanes));
      store<C>(elements(u) + c, xh * load_raw<Vec<C>>(weight + c) + load_raw<Vec<C>>(bias + c), lanes);
    });
    end_row<P>(elements(u), d);
    if (call.norm.mean) static_cast<C*>(call.norm.mean.data)[i] = normal.mean + normal.missing;
    if (call.norm.rstd) static_cast<C*>(call.norm.rstd.data)[i] = normal.rstd;
  }
}

template <typename C, typename P, typename Y>
void forward(const NormAdapterForward& call) {
  const BottleneckForward& f = call.adapter;
  const int64_t d = f.d_in, block = block_rows(d), ld = operand_stride<P>(d), padded = round_up(d, kTileCols<C>);
  const int threads = useful_threads(f.threads, f.n, 2 * f.n * d * f.r);
  Bottleneck<C, P> bottleneck(f, block, threads);
  using W = Workspace;
  Workspace work(bottleneck.bytes() + 2 * W::bytes<C>(padded) + W::bytes<C>(threads * padded) +
                 W::bytes<P>(threads * block * ld));
  bottleneck.take(work);
  C *weight = work.take<C>(padded), *bias = work.take<C>(padded), *scratch = work.take<C>(threads * padded);
  P* tiles = work.take<P>(threads * block * ld);
  fill_parameter(call.norm.weight, d, C(1), weight);
  fill_parameter(call.norm.bias, d, C(0), bias);
  advise_huge_pages(f.y.data, f.n * f.y.stride * static_cast<int64_t>(sizeof(Y)));

#pragma omp parallel num_threads(threads)
  {
    bottleneck.pack();
    const int me = omp_get_thread_num();
    P* u = tiles + me * block * ld;
    for_blocks(f.n, block, [&](int64_t row, int64_t rows, bool) {
      normalise(call, row, rows, weight, bias, scratch + me * padded, u, ld);
      const Operand<Y> add{f.residual ? at<const Y>(f.residual, row) : nullptr, f.residual.stride};
      bottleneck.project(me, row, rows, {u, ld}, at<Y>(f.y, row), f.y.stride, add);
    });
  }
}

// xh of a block of rows; `scratch` has room for one row.
template <typename C, typename P>
void normalise(const NormAdapterBackward& call, int64_t row, int64_t rows, C* scratch, P* xh, int64_t ld) {
  const int64_t d = call.adapter.d_in;
  for (int64_t i = row; i < row + rows; ++i, xh += ld) {
    const C* v = values(call.adapter.x, i, d, scratch);
    const C mean = call.norm.mean ? static_cast<const C*>(call.norm.mean.data)[i] : C(0);
    const C rstd = static_cast<const C*>(call.norm.rstd.data)[i];
    for_columns<C>(d, [&](int64_t c, auto lanes) { store<C>(elements(xh) + c, (load<C>(v + c, lanes) - mean) * rstd, lanes); });
    end_row<P>(elements(xh), d);
  }
}

// dx of a block: with du = dz w_down and gw = du weight, rstd (gw - mean(gw) - xh mean(gw xh)), of RMSNorm without the
// second term; plus g where the residual was x. T is the type of dx and of such a g.
template <typename C, typename P, typename T>
void input_gradient(const NormAdapterBackward& call, int64_t row, int64_t rows, const C* weight, P* xh_rows, int64_t ld,
                    const C* du, int64_t ldu) {
  const BottleneckBackward& b = call.adapter;
  const int64_t d = b.d_in;
  const C size = static_cast<C>(d);
  for (int64_t i = row; i < row + rows; ++i, du += ldu, xh_rows += ld) {
    const auto* xh = elements(xh_rows);
    const C rstd = static_cast<const C*>(call.norm.rstd.data)[i];
    const T* g = b.add_g ? at<const T>(b.g, i) : nullptr;
    T* out = at<T>(b.dx, i);
    C totals[2];
    sum_columns<C, 2>(d, totals, [&](int64_t c, auto lanes, Vec<C>* sums) {
      const Vec<C> gw = load<C>(du + c, lanes) * load_raw<Vec<C>>(weight + c);
      sums[0] += gw;
      sums[1] += gw * load<C>(xh + c, lanes);
    });
    const C offset = call.norm.rms ? C(0) : totals[0] / size * rstd, slope = totals[1] / size * rstd;
    for_columns<C>(d, [&](int64_t c, auto lanes) {
      const Vec<C> gw = load<C>(du + c, lanes) * load_raw<Vec<C>>(weight + c);
      const Vec<C> dx = gw * rstd - (load<C>(xh + c, lanes) * slope + offset);
      store<C>(out + c, g ? dx + load<C>(g + c, lanes) : dx, lanes);
    });
  }
}

// The norm's own gradients, from M = sum dz xh and sum dz: dweight[c] = sum_n du[n, c] xh[n, c] = sum_k w_down[k, c] M[k, c]
// and dbias[c] = sum_n du[n, c] = sum_k w_down[k, c] (sum dz)[k], so that the rows of du and xh need not be read for them.
// By the whole team.
template <typename C, typename P>
void finish_norm(const NormAdapterBackward& call, const BottleneckGradients<C, P>& gradients) {
  const BottleneckBackward& b = call.adapter;
  constexpr int64_t kCols = kTileCols<C>;
#pragma omp for
  for (int64_t first = 0; first < b.d_in; first += kCols) {
    const int64_t count = b.d_in - first < kCols ? b.d_in - first : kCols;
    C w_down[kCols] = {}, dweight[kCols] = {}, dbias[kCols] = {};
    for (int64_t k = 0; k < b.r; ++k) {
      widen(from_column(b.w_down, first), k, 1, count, w_down, kCols);
      const C *m = gradients.down_row(k) + first, dz = gradients.dz_sum()[k];
      for (int64_t c = 0; c < count && call.dweight; ++c) dweight[c] += w_down[c] * m[c];
      for (int64_t c = 0; c < count; ++c) dbias[c] += w_down[c] * dz;
    }
    if (call.dweight) narrow(dweight, kCols, 1, count, from_column(call.dweight, first), 0);
    if (call.dbias) narrow(dbias, kCols, 1, count, from_column(call.dbias, first), 0);
  }
}

template <typename C, typename P>
void backward(const NormAdapterBackward& call) {
  const BottleneckBackward& b = call.adapter;
  const int64_t d = b.d_in, block = block_rows(d), ld = operand_stride<P>(d), ldu = scratch_stride<C>(d);
  const int64_t padded = round_up(d, kTileCols<C>), tiles_size = block * (ld + operand_stride<P>(b.d_out));
  const int threads = useful_threads(b.threads, b.n, 4 * b.n * d * b.r);
  const bool down = b.dw_down || call.dweight, dz = down || b.dx || b.db_down || call.dbias;
  BottleneckGradients<C, P> gradients(b, down, dz, block, threads);
  using W = Workspace;
  Workspace work(gradients.bytes() + 2 * W::bytes<C>(padded) + W::bytes<P>(threads * tiles_size) +
                 W::bytes<C>(threads * block * ldu));
  gradients.take(work);
  C *weight = work.take<C>(padded), *bias = work.take<C>(padded);
  P* tiles = work.take<P>(threads * tiles_size);
  C* scratch = work.take<C>(threads * block * ldu);
  fill_parameter(call.norm.weight, d, C(1), weight);
  fill_parameter(call.norm.bias, d, C(0), bias);
  if (b.dx) advise_huge_pages(b.dx.data, b.n * b.dx.stride * element_bytes(b.dx.dtype));

#pragma omp parallel num_threads(threads)
  {
    gradients.pack();
    const int me = omp_get_thread_num();
    P *xh = tiles + me * tiles_size, *g_tile = xh + block * ld;
    C* du = scratch + me * block * ldu;
    const bool any = for_blocks(b.n, block, [&](int64_t row, int64_t rows, bool first) {
      gradients.add_up(me, row, rows, first, operand(b.g, row, rows, b.d_out, g_tile));
      if (b.dx || down) normalise(call, row, rows, du, xh, ld);
      if (down) gradients.add_down(me, rows, first, {xh, ld});
      if (!b.dx) return;
      gradients.input_gradient(me, rows, du, ldu, Operand<C>{});
      with_storage<C>(b.dx.dtype, [&](auto* dx) {
        input_gradient<C, P, std::remove_pointer_t<decltype(dx)>>(call, row, rows, weight, xh, ld, du, ldu);
      });
    });
    if (!any) gradients.clear(me);
#pragma omp barrier
    gradients.finish_up(me);
    // With u = xh weight + bias the branch's input, dw_down = sum dz u = M diag(weight) + (sum dz) bias^T.
    gradients.finish_down([&](int64_t k, const C* m, C sum) {
      if (!b.dw_down) return;
      for (int64_t c = 0; c < d; ++c) du[c] = m[c] * weight[c] + sum * bias[c];
      narrow(du, ldu, 1, d, b.dw_down, k);
    });
#pragma omp barrier
    if (call.dweight || call.dbias) finish_norm(call, gradients);
  }
  gradients.finish();
}

}  // namespace

void norm_adapter_forward(const NormAdapterForward& f) {
  const BottleneckForward& a = f.adapter;
  if (a.y.dtype == DType::kFloat64) return forward<double, double, double>(f);
#if defined(__AVX512BF16__)
  if (are_bf16({a.x, a.y})) return forward<float, Pair, bf16>(f);
  if (are_bf16({a.x}) && a.y.dtype == DType::kFloat32) return forward<float, Pair, float>(f);  // so is the residual
#endif
  with_storage<float>(a.y.dtype, [&](auto* y) { forward<float, float, std::remove_pointer_t<decltype(y)>>(f); });
}

void norm_adapter_backward(const NormAdapterBackward& b) {
  const BottleneckBackward& a = b.adapter;
  if (a.z.dtype == DType::kFloat64) return backward<double, double>(b);
#if defined(__AVX512BF16__)
  if (are_bf16({a.x, a.z, a.dx})) return backward<float, Pair>(b);
#endif
  backward<float, float>(b);
}

}  // namespace petl::PETL_ISA
