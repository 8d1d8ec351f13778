// The adapter site: y = norm(hidden + residual + s up(act(down(x)))). A block of the sum lives in L2 from its first term
// to the writing of y, and the gradient of one from the reading of g to the writing of dx.
#include <omp.h>

#include <initializer_list>

#include "bottleneck.h"
#include "norm.h"
#include "pages.h"

namespace petl::PETL_ISA {
namespace {

// sum[i, :] = a[row + i, :] + b[row + i, :], of which either may be absent.
template <typename C>
void add_terms(const Rows& a, const Rows& b, int64_t row, int64_t rows, int64_t d, C* sum, int64_t ld) {
  if (!a && !b) return std::memset(sum, 0, sizeof(C) * static_cast<size_t>(rows * ld)), void();
  if (!a || !b) return widen(a ? a : b, row, rows, d, sum, ld);
  with_storage<C>(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for (int64_t i = 0; i < rows; ++i) {
      const T* from_a = static_cast<const T*>(a.data) + (row + i) * a.stride;
      const T* from_b = static_cast<const T*>(b.data) + (row + i) * b.stride;
      for_columns<C>(d, [&](int64_t c, auto lanes) {
        store<C>(sum + i * ld + c, load<C>(from_a + c, lanes) + load<C>(from_b + c, lanes), lanes);
      });
    }
  });
}

// y, the normalised rows where they are kept, and the statistics of a block of the finished sum.
template <typename C, typename T, bool kStore>
void normalise(const AdapterNormForward& call, int64_t row, int64_t rows, const C* weight, const C* bias, const C* sum,
               int64_t ld) {
  const Rows &out = call.adapter.y, &kept = call.normal;
  const int64_t d = call.adapter.d_out;
  for (int64_t i = row; i < row + rows; ++i, sum += ld) {
    const Normal<C> normal = statistics(sum, d, call.norm.eps, call.norm.rms);
    T *y = static_cast<T*>(out.data) + i * out.stride, *store_to = static_cast<T*>(kept.data) + i * kept.stride;
    for_columns<C>(d, [&](int64_t c, auto lanes) {
      const Vec<C> xh = normal(load<C>(sum + c, lanes));
      if constexpr (kStore) store<C>(store_to + c, xh, lanes);
      store<C>(y + c, xh * load_raw<Vec<C>>(weight + c) + load_raw<Vec<C>>(bias + c), lanes);
    });
    if (call.norm.mean) static_cast<C*>(call.norm.mean.data)[i] = normal.mean + normal.missing;
    if (call.norm.rstd) static_cast<C*>(call.norm.rstd.data)[i] = normal.rstd;
  }
}

template <typename C, typename T>
void forward(const AdapterNormForward& call) {
  const BottleneckForward& f = call.adapter;
  const int64_t d = f.d_out, block = block_rows(d), ld = scratch_stride<C>(d), padded = round_up(d, kTileCols<C>);
  const int threads = useful_threads(f.threads, f.n, 2 * f.n * d * f.r);
  const int64_t ldz = round_up(f.r, kTileCols<C>) + kLanes<C>, z_size = block * ldz, tile_size = block * ld;
  DownProjection<C> down(f.r, f.d_in);
  UpProjection<C> up(f.r, d);
  Workspace work(down.bytes() + up.bytes() + 2 * Workspace::bytes<C>(padded) +
                 Workspace::bytes<C>(threads * (z_size + 2 * tile_size)));
  down.take(work, f.b_down);
  up.take(work, f.b_up, f.scale, f.scale_size, f.alpha);
  C *weight = work.take<C>(padded), *bias = work.take<C>(padded);
  C* scratch = work.take<C>(threads * (z_size + 2 * tile_size));
  fill_parameter(call.norm.weight, d, C(1), weight);
  fill_parameter(call.norm.bias, d, C(0), bias);
  for (const Rows* out : {&f.y, &call.normal}) {
    if (*out) advise_huge_pages(out->data, f.n * out->stride * element_bytes(out->dtype));
  }

#pragma omp parallel num_threads(threads)
  {
    down.pack(f.w_down);
    up.pack(f.w_up);
#pragma omp barrier
    const int me = omp_get_thread_num();
    C *z = scratch + me * (z_size + 2 * tile_size), *sum = z + z_size, *x_tile = sum + tile_size;
    const Range range = share(f.n, me, omp_get_num_threads());
    for (int64_t row = range.begin; row < range.end; row += block) {
      const int64_t rows = range.end - row < block ? range.end - row : block;
      down.project(rows, operand<C>(f.x, row, rows, f.d_in, x_tile), z, ldz);
      if (f.activation == Activation::kSoftmax) softmax_rows(z, rows, ldz, f.r);
      if (f.z) narrow(z, ldz, rows, f.r, f.z, row);
      activate_rows(f.activation, z, rows, ldz, f.r);
      add_terms(call.hidden, f.residual, row, rows, d, sum, ld);
      up.project(rows, z, ldz, sum, ld, {sum, ld});
      if (call.normal) {
        normalise<C, T, true>(call, row, rows, weight, bias, sum, ld);
      } else {
        normalise<C, T, false>(call, row, rows, weight, bias, sum, ld);
      }
    }
  }
}

// The gradient of the sum from that of y, row by row: with xh the normalised row and gw = g weight,
// du = rstd (gw - mean(gw) - xh mean(gw xh)), of RMSNorm without the second term; dweight += g xh, dbias += g.
template <typename C, typename T>
void differentiate_norm(const AdapterNormBackward& call, int64_t row, int64_t rows, const C* weight, C* du, int64_t ld,
                        C* dweight, C* dbias) {
  const Rows &g = call.adapter.g, &kept = call.normal, &out = call.dsum;
  const int64_t d = call.adapter.d_out;
  const C size = static_cast<C>(d);
  const bool parameters = call.dweight || call.dbias;
  for (int64_t i = row; i < row + rows; ++i, du += ld) {
    const T *from = static_cast<const T*>(g.data) + i * g.stride, *normal = static_cast<const T*>(kept.data) + i * kept.stride;
    T* dsum = out ? static_cast<T*>(out.data) + i * out.stride : nullptr;
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
      store<C>(du + c, value, lanes);
      if (dsum) store<C>(dsum + c, value, lanes);
    });
  }
}

// dx of a block = dz w_down, and du beside it where x was a term of the sum; du is overwritten.
template <typename C>
void input_gradient(const BottleneckBackward& b, const BottleneckGradients<C>& gradients, int me, int64_t row,
                    int64_t rows, C* du, int64_t ld) {
  const Operand<C> add{b.add_g ? du : nullptr, ld};
  if (b.dx.dtype == (sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32)) {
    gradients.project_down(me, rows, static_cast<C*>(b.dx.data) + row * b.dx.stride, b.dx.stride, add);
  } else {
    gradients.project_down(me, rows, du, ld, add);
    narrow(du, ld, rows, b.d_in, b.dx, row);
  }
}

template <typename C, typename T>
void backward(const AdapterNormBackward& call) {
  const BottleneckBackward& b = call.adapter;
  const int64_t d = b.d_out, block = block_rows(d), ld = scratch_stride<C>(d), padded = round_up(d, kTileCols<C>);
  const int threads = useful_threads(b.threads, b.n, 5 * b.n * d * b.r);
  const bool parameters = call.dweight || call.dbias;
  const int64_t tiles = 2 * block * ld + 2 * padded;
  BottleneckGradients<C> gradients(b, static_cast<bool>(b.dw_down), b.dx || b.dw_down || b.db_down, block, threads);
  Workspace work(gradients.bytes() + 2 * Workspace::bytes<C>(padded) + Workspace::bytes<C>(threads * tiles) +
                 Workspace::bytes<double>(threads * 2 * padded));
  gradients.take(work);
  C *weight = work.take<C>(padded), *scales = work.take<C>(padded), *scratch = work.take<C>(threads * tiles);
  double* totals = work.take<double>(threads * 2 * padded);
  std::memset(totals, 0, sizeof(double) * static_cast<size_t>(threads * 2 * padded));
  fill_parameter(call.norm.weight, d, C(1), weight);
  fill_scales(b.scale, b.scale_size, b.alpha, d, scales);
  for (const Rows* out : {&b.dx, &call.dsum}) {
    if (*out) advise_huge_pages(out->data, b.n * out->stride * element_bytes(out->dtype));
  }

#pragma omp parallel num_threads(threads)
  {
    gradients.pack(scales);
#pragma omp barrier
    const int me = omp_get_thread_num();
    C *du = scratch + me * tiles, *x_tile = du + block * ld, *sums = x_tile + block * ld;
    const Range range = share(b.n, me, omp_get_num_threads());
    gradients.clear(me);
    std::memset(sums, 0, sizeof(C) * static_cast<size_t>(2 * padded));
    for (int64_t row = range.begin; row < range.end; row += block) {
      const int64_t rows = range.end - row < block ? range.end - row : block;
      differentiate_norm<C, T>(call, row, rows, weight, du, ld, sums, sums + padded);
      if (parameters) flush_sums(sums, totals + me * 2 * padded, 2 * padded);
      const Operand<C> x = b.dw_down ? operand<C>(b.x, row, rows, b.d_in, x_tile) : Operand<C>{};
      gradients.add(me, row, rows, {du, ld}, x);
      if (b.dx) input_gradient(b, gradients, me, row, rows, du, ld);
    }
#pragma omp barrier
    gradients.finish_up(me, scales);
    gradients.sum_down();
  }
  for (int64_t k = 0; k < (b.dw_down ? b.r : 0); ++k) narrow(gradients.down_row(k), b.d_in, 1, b.d_in, b.dw_down, k);
  gradients.finish();
  if (!parameters) return;
  sum_partials(totals, 2 * padded, threads, 2 * padded, totals);
  for (int64_t c = 0; c < 2 * padded; ++c) scratch[c] = static_cast<C>(totals[c]);
  if (call.dweight) narrow(scratch, padded, 1, d, call.dweight, 0);
  if (call.dbias) narrow(scratch + padded, padded, 1, d, call.dbias, 0);
}

}  // namespace

void adapter_norm_forward(const AdapterNormForward& f) {
  if (f.adapter.y.dtype == DType::kFloat64) return forward<double, double>(f);
  with_storage<float>(f.adapter.y.dtype, [&](auto* y) { forward<float, std::remove_pointer_t<decltype(y)>>(f); });
}

void adapter_norm_backward(const AdapterNormBackward& b) {
  if (b.adapter.g.dtype == DType::kFloat64) return backward<double, double>(b);
  with_storage<float>(b.adapter.g.dtype, [&](auto* g) { backward<float, std::remove_pointer_t<decltype(g)>>(b); });
}

}  // namespace petl::PETL_ISA
