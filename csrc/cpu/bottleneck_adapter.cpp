// The bottleneck adapter: each thread walks blocks of rows, and everything between reading x and writing y (or between
// reading g and x and writing dx) stays in its L2 cache. Compiled once per instruction set.
#include "bottleneck.h"
#include "pages.h"

namespace petl::PETL_ISA {
namespace {

template <typename C, typename P, typename Y>
void forward(const BottleneckForward& f) {
  const int64_t block = block_rows(f.d_in), x_size = block * scratch_stride<C>(f.d_in);
  const int threads = useful_threads(f.threads, f.n, 2 * f.n * f.d_in * f.r);
  Bottleneck<C, P> bottleneck(f, block, threads);
  Workspace work(bottleneck.bytes() + Workspace::bytes<P>(threads * x_size));
  bottleneck.take(work);
  P* tiles = work.take<P>(threads * x_size);
  advise_huge_pages(f.y.data, f.n * f.y.stride * static_cast<int64_t>(sizeof(Y)));

#pragma omp parallel num_threads(threads)
  {
    bottleneck.pack();
    const int me = omp_get_thread_num();
    for_blocks(f.n, block, [&](int64_t row, int64_t rows, bool) {
      const Operand<P> x = operand(f.x, row, rows, f.d_in, tiles + me * x_size);
      const Operand<Y> add{f.residual ? at<const Y>(f.residual, row) : nullptr, f.residual.stride};
      bottleneck.project(me, row, rows, x, at<Y>(f.y, row), f.y.stride, add);
    });
  }
}

template <typename C, typename P, typename X>
void backward(const BottleneckBackward& b) {
  const int64_t block = block_rows(b.d_in);
  const int64_t g_size = block * scratch_stride<C>(b.d_out), tiles_size = g_size + block * scratch_stride<C>(b.d_in);
  const int threads = useful_threads(b.threads, b.n, 4 * b.n * b.d_in * b.r);
  const bool down = static_cast<bool>(b.dw_down);
  BottleneckGradients<C, P> gradients(b, down, b.dx || down || b.db_down || b.dgate, block, threads);
  Workspace work(gradients.bytes() + Workspace::bytes<P>(threads * tiles_size));
  gradients.take(work);
  P* tiles = work.take<P>(threads * tiles_size);
  if (b.dx) advise_huge_pages(b.dx.data, b.n * b.dx.stride * static_cast<int64_t>(sizeof(X)));

#pragma omp parallel num_threads(threads)
  {
    gradients.pack();
    const int me = omp_get_thread_num();
    P *g_tile = tiles + me * tiles_size, *x_tile = g_tile + g_size;
    const bool any = for_blocks(b.n, block, [&](int64_t row, int64_t rows, bool first) {
      gradients.add_up(me, row, rows, first, operand(b.g, row, rows, b.d_out, g_tile));
      if (down) gradients.add_down(me, rows, first, operand(b.x, row, rows, b.d_in, x_tile));
      if (!b.dx) return;
      const Operand<X> add{b.add_g ? at<const X>(b.g, row) : nullptr, b.g.stride};
      gradients.input_gradient(me, rows, at<X>(b.dx, row), b.dx.stride, add);
    });
    if (!any) gradients.clear(me);
#pragma omp barrier
    gradients.finish_up(me);
    gradients.finish_down([&](int64_t k, const C* row, C) {
      if (down) narrow(row, b.d_in, 1, b.d_in, b.dw_down, k);
    });
  }
  gradients.finish();
}

}  // namespace

void bottleneck_forward(const BottleneckForward& f) {
  if (f.y.dtype == DType::kFloat64) return forward<double, double, double>(f);
#if defined(__AVX512BF16__)
  if (are_bf16({f.x, f.y})) return forward<float, Pair, bf16>(f);
  if (are_bf16({f.x}) && f.y.dtype == DType::kFloat32) return forward<float, Pair, float>(f);  // so is the residual
#endif
  with_storage<float>(f.y.dtype, [&](auto* y) { forward<float, float, std::remove_pointer_t<decltype(y)>>(f); });
}

void bottleneck_backward(const BottleneckBackward& b) {
  // dx has the dtype of x and, when g is added to it, of g; without dx its type does not matter.
  const DType dtype = b.dx ? b.dx.dtype : b.g.dtype;
  if (dtype == DType::kFloat64) return backward<double, double, double>(b);
#if defined(__AVX512BF16__)
  if (are_bf16({b.x, b.z, b.dx}) && (b.z || are_bf16({b.g}))) return backward<float, Pair, bf16>(b);
#endif
  with_storage<float>(dtype, [&](auto* x) { backward<float, float, std::remove_pointer_t<decltype(x)>>(b); });
}

}  // namespace petl::PETL_ISA
