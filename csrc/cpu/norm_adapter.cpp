// The pre-norm branch: y = residual + s up(act(down(norm(x)))). The normalised rows exist only block by block, in L2.
#include <omp.h>

#include "bottleneck.h"
#include "norm.h"
#include "pages.h"

namespace petl::PETL_ISA {
namespace {

template <typename C>
void forward(const NormAdapterForward& call) {
  const BottleneckForward& f = call.adapter;
  const int64_t d = f.d_in, block = block_rows(d), ld = scratch_stride<C>(d), ldy = scratch_stride<C>(f.d_out);
  const int64_t padded = round_up(d, kTileCols<C>), ldz = round_up(f.r, kTileCols<C>) + kLanes<C>;
  const int threads = useful_threads(f.threads, f.n, 2 * f.n * d * f.r);
  const int64_t tiles = block * (ldz + ld + ldy);
  DownProjection<C> down(f.r, d);
  UpProjection<C> up(f.r, f.d_out);
  Workspace work(down.bytes() + up.bytes() + 2 * Workspace::bytes<C>(padded) + Workspace::bytes<C>(threads * tiles));
  down.take(work, f.b_down);
  up.take(work, f.b_up, f.scale, f.scale_size, f.alpha);
  C *weight = work.take<C>(padded), *bias = work.take<C>(padded), *scratch = work.take<C>(threads * tiles);
  fill_parameter(call.norm.weight, d, C(1), weight);
  fill_parameter(call.norm.bias, d, C(0), bias);
  const bool direct = f.y.dtype == (sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32);
  advise_huge_pages(f.y.data, f.n * f.y.stride * element_bytes(f.y.dtype));

#pragma omp parallel num_threads(threads)
  {
    down.pack(f.w_down);
    up.pack(f.w_up);
#pragma omp barrier
    const int me = omp_get_thread_num();
    C *z = scratch + me * tiles, *u = z + block * ldz, *y_tile = u + block * ld;
    const Range range = share(f.n, me, omp_get_num_threads());
    for (int64_t row = range.begin; row < range.end; row += block) {
      const int64_t rows = range.end - row < block ? range.end - row : block;
      for (int64_t i = 0; i < rows; ++i) {
        C* v = u + i * ld;
        widen(f.x, row + i, 1, d, v, ld);
        const Normal<C> normal = statistics(v, d, call.norm.eps, call.norm.rms);
        for_columns<C>(d, [&](int64_t c, auto lanes) {
          const Vec<C> xh = normal(load<C>(v + c, lanes));
          store<C>(v + c, xh * load_raw<Vec<C>>(weight + c) + load_raw<Vec<C>>(bias + c), lanes);
        });
        if (call.norm.mean) static_cast<C*>(call.norm.mean.data)[row + i] = normal.mean + normal.missing;
        if (call.norm.rstd) static_cast<C*>(call.norm.rstd.data)[row + i] = normal.rstd;
      }
      down.project(rows, {u, ld}, z, ldz);
      if (f.activation == Activation::kSoftmax) softmax_rows(z, rows, ldz, f.r);
      if (f.z) narrow(z, ldz, rows, f.r, f.z, row);
      activate_rows(f.activation, z, rows, ldz, f.r);
      if (direct) {
        const C* add = f.residual ? static_cast<const C*>(f.residual.data) + row * f.residual.stride : nullptr;
        C* y = static_cast<C*>(f.y.data) + row * f.y.stride;
        up.project(rows, z, ldz, y, f.y.stride, {add, f.residual.stride});
        continue;
      }
      if (f.residual) widen(f.residual, row, rows, f.d_out, y_tile, ldy);
      up.project(rows, z, ldz, y_tile, ldy, {f.residual ? y_tile : nullptr, ldy});
      narrow(y_tile, ldy, rows, f.d_out, f.y, row);
    }
  }
}

// dx of a block: with du = dz w_down, which arrives in `du`, and gw = du weight, rstd (gw - mean(gw) - xh mean(gw xh)),
// of RMSNorm without the second term; plus g where the residual was x.
template <typename C>
void input_gradient(const NormAdapterBackward& call, int64_t row, int64_t rows, const C* weight, const C* xh,
                    const Operand<C>& g, C* du, int64_t ld) {
  const BottleneckBackward& b = call.adapter;
  const int64_t d = b.d_in;
  const C size = static_cast<C>(d);
  for (int64_t i = 0; i < rows; ++i, du += ld, xh += ld) {
    const C rstd = static_cast<const C*>(call.norm.rstd.data)[row + i];
    const C* g_row = b.add_g ? g.data + i * g.ld : nullptr;
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
      store<C>(du + c, g_row ? dx + load<C>(g_row + c, lanes) : dx, lanes);
    });
    narrow(du, ld, 1, d, b.dx, row + i);
  }
}

// What follows from M = sum dz xh and sum dz, with u = xh weight + bias the branch's input: dw_down = sum dz u =
// M diag(weight) + (sum dz) bias^T, dweight[c] = sum_n du[n, c] xh[n, c] = sum_k w_down[k, c] M[k, c] and
// dbias[c] = sum_n du[n, c] = sum_k w_down[k, c] (sum dz)[k]: the rows of du and xh need not be read for them.
template <typename C>
void finish_down(const NormAdapterBackward& call, BottleneckGradients<C>& gradients, const C* weight, const C* bias,
                 C* scratch, int64_t padded) {
  const BottleneckBackward& b = call.adapter;
  C *dweight = scratch, *dbias = dweight + padded, *w_down = dbias + padded, *dw_down = w_down + padded;
  std::memset(scratch, 0, sizeof(C) * static_cast<size_t>(2 * padded));
  for (int64_t k = 0; k < b.r; ++k) {
    const C *m = gradients.down_row(k), dz = gradients.dz_sum()[k];
    if (call.dweight || call.dbias) {
      widen(b.w_down, k, 1, b.d_in, w_down, padded);
      for (int64_t c = 0; c < b.d_in && call.dweight; ++c) dweight[c] += w_down[c] * m[c];
      for (int64_t c = 0; c < b.d_in; ++c) dbias[c] += w_down[c] * dz;
    }
    if (b.dw_down) {
      for (int64_t c = 0; c < b.d_in; ++c) dw_down[c] = m[c] * weight[c] + dz * bias[c];
      narrow(dw_down, padded, 1, b.d_in, b.dw_down, k);
    }
  }
  if (call.dweight) narrow(dweight, padded, 1, b.d_in, call.dweight, 0);
  if (call.dbias) narrow(dbias, padded, 1, b.d_in, call.dbias, 0);
}

template <typename C>
void backward(const NormAdapterBackward& call) {
  const BottleneckBackward& b = call.adapter;
  const int64_t d = b.d_in, block = block_rows(d), ld = scratch_stride<C>(d), ldg = scratch_stride<C>(b.d_out);
  const int64_t padded = round_up(d, kTileCols<C>), tiles = block * (2 * ld + ldg) + 4 * padded;
  const int threads = useful_threads(b.threads, b.n, 4 * b.n * d * b.r);
  const bool down = b.dw_down || call.dweight, dz = down || b.dx || b.db_down || call.dbias;
  BottleneckGradients<C> gradients(b, down, dz, block, threads);
  Workspace work(gradients.bytes() + Workspace::bytes<C>(round_up(b.d_out, kTileCols<C>)) +
                 2 * Workspace::bytes<C>(padded) + Workspace::bytes<C>(threads * tiles));
  gradients.take(work);
  C *scales = work.take<C>(round_up(b.d_out, kTileCols<C>)), *weight = work.take<C>(padded), *bias = work.take<C>(padded);
  C* scratch = work.take<C>(threads * tiles);
  fill_scales(b.scale, b.scale_size, b.alpha, b.d_out, scales);
  fill_parameter(call.norm.weight, d, C(1), weight);
  fill_parameter(call.norm.bias, d, C(0), bias);
  if (b.dx) advise_huge_pages(b.dx.data, b.n * b.dx.stride * element_bytes(b.dx.dtype));

#pragma omp parallel num_threads(threads)
  {
    gradients.pack(scales);
#pragma omp barrier
    const int me = omp_get_thread_num();
    C *xh = scratch + me * tiles, *du = xh + block * ld, *g_tile = du + block * ld;
    const Range range = share(b.n, me, omp_get_num_threads());
    gradients.clear(me);
    for (int64_t row = range.begin; row < range.end; row += block) {
      const int64_t rows = range.end - row < block ? range.end - row : block;
      const Operand<C> g = operand<C>(b.g, row, rows, b.d_out, g_tile);
      for (int64_t i = 0; i < (b.dx || down ? rows : 0); ++i) {
        C* v = xh + i * ld;
        widen(b.x, row + i, 1, d, v, ld);
        const C mean = call.norm.mean ? static_cast<const C*>(call.norm.mean.data)[row + i] : C(0);
        const C rstd = static_cast<const C*>(call.norm.rstd.data)[row + i];
        for_columns<C>(d, [&](int64_t c, auto lanes) { store<C>(v + c, (load<C>(v + c, lanes) - mean) * rstd, lanes); });
      }
      gradients.add(me, row, rows, g, {xh, ld});
      if (!b.dx) continue;
      gradients.project_down(me, rows, du, ld, {});
      input_gradient(call, row, rows, weight, xh, g, du, ld);
    }
#pragma omp barrier
    gradients.finish_up(me, scales);
    gradients.sum_down();
  }
  gradients.finish();
  if (down || call.dbias) finish_down(call, gradients, weight, bias, scratch, padded);
}

}  // namespace

void norm_adapter_forward(const NormAdapterForward& f) {
  if (f.adapter.x.dtype == DType::kFloat64) return forward<double>(f);
  forward<float>(f);
}

void norm_adapter_backward(const NormAdapterBackward& b) {
  if (b.adapter.z.dtype == DType::kFloat64) return backward<double>(b);
  backward<float>(b);
}

}  // namespace petl::PETL_ISA
