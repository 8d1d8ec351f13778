// The bottleneck adapter with parameters per task. Rows are taken in the order of their tasks, so that a thread works for
// few tasks and holds the weight gradients of one at a time; blocks of them stay in its L2 as in bottleneck_adapter.cpp.
#include <omp.h>

#include "blocks.h"
#include "bottleneck_rows.h"
#include "pages.h"
#include "task_order.h"

namespace petl::PETL_ISA {
namespace {

// The rows of some spans as a product reads them, as `operand` gives those of one.
template <typename P>
Operand<P> gathered(const Rows& m, const Spans& spans, int64_t cols, P* scratch) {
  if (spans.size() == 1) return operand(m, spans[0].row, spans[0].count, cols, scratch);
  const int64_t ld = operand_stride<P>(cols);
  P* to = scratch;
  for (const Span& s : spans) {
    copy_rows(m, s.row, s.count, cols, to, ld);
    to += s.count * ld;
  }
  return {scratch, ld};
}

// Calls product(out, ldo, add, ldadd) on the rows of some spans: in place if there is one, else in `tile`.
template <typename T, typename F>
void produce(const Rows& out, const Rows& add, const Spans& spans, int64_t cols, T* tile, F product) {
  if (spans.size() == 1) {
    product(at<T>(out, spans[0].row), out.stride, add ? at<const T>(add, spans[0].row) : nullptr, add.stride);
    return;
  }
  const size_t bytes = sizeof(T) * static_cast<size_t>(cols);
  T* row = tile;
  for (const Span& s : spans) {
    for (int64_t i = 0; add && i < s.count; ++i) std::memcpy(row + i * cols, at<const T>(add, s.row + i), bytes);
    row += s.count * cols;
  }
  product(tile, cols, add ? tile : nullptr, cols);
  row = tile;
  for (const Span& s : spans) {
    for (int64_t i = 0; i < s.count; ++i) std::memcpy(at<T>(out, s.row + i), row + i * cols, bytes);
    row += s.count * cols;
  }
}

template <typename C, typename P, typename Y>
void forward(const AdapterBankForward& f) {
  constexpr int64_t kCols = kTileCols<C>;
  const TaskOrder order(f);
  const int64_t n = f.samples * f.rows, block = block_rows(f.d_in);
  const int64_t rp = round_up(f.r, kCols), dp = round_up(f.d_out, kCols), panels = (rp + dp) / kCols;
  const int threads = useful_threads(f.threads, n, 2 * n * f.d_in * f.r);
  const int64_t ldz = rp + kLanes<C>, z_size = block * ldz, x_size = block * scratch_stride<C>(f.d_in);
  const int64_t y_size = (block * dp * static_cast<int64_t>(sizeof(Y))) / static_cast<int64_t>(sizeof(C)) + kCols;
  const int64_t tiles_size = z_size + x_size + round_up(y_size, kCols);
  const int64_t down_depth = steps<P>(f.d_in), depth = steps<P>(f.r);
  // Of one task: w_down and w_up in P, which is as large as C, then the biases.
  const int64_t up_at = rp * down_depth, b_down_at = up_at + depth * dp, packed_size = b_down_at + rp + dp;
  const auto present = static_cast<int64_t>(order.present.size());
  using W = Workspace;
  Workspace work(W::bytes<C>(dp) + W::bytes<C>(present * packed_size) + W::bytes<C>(threads * tiles_size));
  C* scales = work.take<C>(dp);
  P* packed = work.take<P>(present * packed_size);
  C* tiles = work.take<C>(threads * tiles_size);
  std::vector<Spans> team_spans = spans_of(threads, block);

  advise_huge_pages(f.y.data, n * f.y.stride * static_cast<int64_t>(sizeof(Y)));
  for (int64_t c = 0; c < dp; ++c) scales[c] = static_cast<C>(f.scale);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t i = 0; i < present * panels; ++i) {
      const Adapter& a = f.adapters[order.present[i / panels]];
      P* to = packed + i / panels * packed_size;
      const int64_t p = i % panels * kCols, up = p - rp;
      if (up < 0) {
        pack_transposed(a.w_down, p, f.r, f.d_in, nullptr, to + p * down_depth);
      } else {
        pack_transposed(a.w_up, up, f.d_out, f.r, scales, to + up_at + up * depth);
      }
      if (i % panels) continue;
      C *b_down = reinterpret_cast<C*>(to + b_down_at), *b_up = b_down + rp;
      std::memset(b_down, 0, sizeof(C) * static_cast<size_t>(rp + dp));
      if (a.b_down) widen(a.b_down, 0, 1, f.r, b_down, rp);
      if (a.b_up) widen(a.b_up, 0, 1, f.d_out, b_up, dp);
      for (int64_t c = 0; c < f.d_out; ++c) b_up[c] *= scales[c];
    }

    const int me = omp_get_thread_num();
    C *z = tiles + me * tiles_size, *x_tile = z + z_size;
    Y* y_tile = reinterpret_cast<Y*>(x_tile + x_size);
    Spans& spans = team_spans[static_cast<size_t>(me)];
    order.for_tasks(share(n, me, omp_get_num_threads()), [&](int64_t i, int64_t begin, int64_t end) {
      const P* own = packed + i * packed_size;
      const C *b_down = reinterpret_cast<const C*>(own + b_down_at), *b_up = b_down + rp;
      for (int64_t place = begin, rows; place < end; place += rows) {
        rows = order.block(place, end, block, spans);
        const Operand<P> x = gathered(f.x, spans, f.d_in, reinterpret_cast<P*>(x_tile));
        deep_product<C>(rows, f.r, down_depth, x, own, z, ldz, b_down);
        const C* from = z;
        for (const Span& s : spans) {
          if (f.z) narrow(from, ldz, s.count, f.r, f.z, s.row);
          from += s.count * ldz;
        }
        activate_rows(f.activation, z, rows, ldz, f.r);
        const Operand<P> h = left_operand<P>(z, rows, ldz, f.r);
        produce(f.y, f.residual, spans, f.d_out, y_tile, [&](Y* y, int64_t ldy, const Y* add, int64_t ldadd) {
          gemm<C, Y, false, P>({rows, f.d_out, depth, h.data, h.ld, own + up_at, kCols, depth * kCols, y, ldy, add, ldadd,
                                b_up});
        });
      }
    });
  }
}

// What the backward accumulates over the rows of one task, as in bottleneck_adapter.cpp: up[k, c] = sum h[n, k] g[n, c],
// with the row k = r summing g itself, down[k, c] = sum dz[n, k] x[n, c], and b_down[k] = sum dz[n, k].
template <typename C>
struct BackwardPlan {
  static constexpr int64_t kCols = kTileCols<C>;
  const AdapterBankBackward& b;
  TaskOrder order;
  bool up = false, down = false, b_down = false;  // whether any task wants dw_up or db_up, dw_down, db_down
  int64_t n, rp, op, ip, ldz, block, down_at, b_down_at, partial_size;
  int threads;

  explicit BackwardPlan(const AdapterBankBackward& call) : b(call), order(call), n(call.samples * call.rows) {
    for (int64_t t = 0; t < b.tasks; ++t) {
      const Adapter& a = b.gradients[t];
      up |= a.w_up || a.b_up;
      down |= static_cast<bool>(a.w_down);
      b_down |= static_cast<bool>(a.b_down);
    }
    rp = round_up(b.r, kCols), op = round_up(b.d_out, kCols), ip = round_up(b.d_in, kCols);
    ldz = round_up(b.r + 1, kCols) + kLanes<C>;
    block = block_rows(b.d_in);
    down_at = up ? (b.r + 1) * op : 0;
    b_down_at = down_at + (down ? rp * ip : 0);
    partial_size = b_down_at + rp;
    threads = useful_threads(b.threads, n, 4 * n * b.d_in * b.r);
  }

  // The threads that have rows of a task: from `first` to `last`.
  std::pair<int, int> threads_of(int64_t task) const {
    int first = 0, last = threads - 1;
    while (share(n, first, threads).end <= order.first[task]) ++first;
    while (share(n, last, threads).begin >= order.first[task + 1]) --last;
    return {first, last};
  }
  // Of a thread's two partial sums that for a task: the first for what it may share with threads before it.
  C* partial(C* partials, int thread, int64_t task) const {
    const bool begun_before = share(n, thread, threads).begin >= order.first[task];
    return partials + (2 * thread + (begun_before ? 0 : 1)) * partial_size;
  }
};

// dh, dz, dx and the partial sums of one block of rows.
template <typename C, typename P, typename X>
void backward_block(const BackwardPlan<C>& plan, const Adapter& grads, const Spans& spans, int64_t rows, bool first,
                    const P* w_up, const P* w_down, C* tiles, C* partial) {
  constexpr int64_t kCols = kTileCols<C>;
  const AdapterBankBackward& b = plan.b;
  const int64_t ldz = plan.ldz, depth = steps<P>(b.r);
  C *h = tiles, *dz = h + plan.block * ldz, *g_tile = dz + plan.block * ldz;
  C *x_tile = g_tile + plan.block * scratch_stride<C>(b.d_out), *dx_tile = x_tile + plan.block * scratch_stride<C>(b.d_in);
  P* panel = reinterpret_cast<P*>(dx_tile + plan.block * scratch_stride<C>(b.d_in));
  const Operand<P> g = gathered(b.g, spans, b.d_out, reinterpret_cast<P*>(g_tile));
  C* to = h;
  for (const Span& s : spans) {
    if (b.z) widen(b.z, s.row, s.count, b.r, to, ldz);
    to += s.count * ldz;
  }
  if (b.dx || grads.w_down || grads.b_down) {
    deep_product<C>(rows, b.r, steps<P>(b.d_out), g, w_up, dz, ldz, nullptr);
    differentiate_rows(b.activation, h, dz, rows, ldz, b.r);
  } else if (b.z) {
    activate_rows(b.activation, h, rows, ldz, b.r);
  }
  if (grads.w_up || grads.b_up) {
    const int64_t skipped = grads.w_up ? 0 : b.r;  // for b_up alone only g is summed
    for (int64_t i = 0; i < rows; ++i) h[i * ldz + b.r] = C(1);
    const P* left = left_transposed<P>(h, rows, ldz, b.r + 1, h) + skipped;
    add_row_products(b.r + 1 - skipped, b.d_out, rows, left, ldz, g, panel, partial + skipped * plan.op, first);
  }
  if (grads.w_down) {
    const Operand<P> x = gathered(b.x, spans, b.d_in, reinterpret_cast<P*>(x_tile));
    const P* left = left_transposed<P>(dz, rows, ldz, b.r, h);  // h is done with
    add_row_products(b.r, b.d_in, rows, left, ldz, x, panel, partial + plan.down_at, first);
  }
  if (grads.b_down) {
    for (int64_t k = 0; k < b.r; k += kLanes<C>) {  // the block's own sum first, as in bottleneck_adapter.cpp
      Vec<C> sum = {};
      for (int64_t i = 0; i < rows; ++i) sum += load_raw<Vec<C>>(dz + i * ldz + k);
      C* total = partial + plan.b_down_at + k;
      Storage<C, C>::store(total, first ? sum : load_raw<Vec<C>>(total) + sum);
    }
  }
  if (b.dx) {
    const Operand<P> left = left_operand<P>(dz, rows, ldz, b.r);
    produce(b.dx, b.add_g ? b.g : Rows{}, spans, b.d_in, reinterpret_cast<X*>(dx_tile),
            [&](X* dx, int64_t ldx, const X* add, int64_t ldadd) {
              gemm<C, X, false, P>({rows, b.d_in, depth, left.data, left.ld, w_down, kCols, depth * kCols, dx, ldx, add,
                                    ldadd, nullptr});
            });
  }
}

// A part of one task's gradients from the partial sums of its threads, in their order: of the output channels, then
// input channels, in panel `p` of kTileCols; panel 0 has db_down too. `sums` holds two panels.
template <typename C>
void finish_panel(const BackwardPlan<C>& plan, int64_t task, C* partials, int64_t p, C* sums) {
  constexpr int64_t kCols = kTileCols<C>;
  const AdapterBankBackward& b = plan.b;
  const Adapter& grads = b.gradients[task];
  const auto [first, last] = plan.threads_of(task);
  const auto total = [&](int64_t offset, int64_t count, C* out) {
    std::memcpy(out, plan.partial(partials, first, task) + offset, sizeof(C) * static_cast<size_t>(count));
    for (int t = first + 1; t <= last; ++t) {
      const C* more = plan.partial(partials, t, task) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] += more[i];
    }
  };
  const int64_t up_panels = plan.op / kCols, c = (p < up_panels ? p : p - up_panels) * kCols;
  if (p < up_panels) {
    const int64_t count = b.d_out - c < kCols ? b.d_out - c : kCols;
    const C scale = static_cast<C>(b.scale);
    C* row = sums + b.r * kCols;
    if (grads.b_up) {
      total(b.r * plan.op + c, kCols, row);
      for (int64_t i = 0; i < kCols; ++i) row[i] *= scale;
      narrow(row, kCols, 1, count, {at<char>(grads.b_up, 0) + c * element_bytes(grads.b_up.dtype), grads.b_up.dtype, 0}, 0);
    }
    for (int64_t k = 0; grads.w_up && k < b.r; ++k) total(k * plan.op + c, kCols, sums + k * kCols);
    for (int64_t i = 0; grads.w_up && i < count; ++i) {
      for (int64_t k = 0; k < b.r; ++k) row[k] = scale * sums[k * kCols + i];
      narrow(row, b.r, 1, b.r, grads.w_up, c + i);
    }
  } else if (grads.w_down) {
    const int64_t count = b.d_in - c < kCols ? b.d_in - c : kCols;
    for (int64_t k = 0; k < b.r; ++k) total(plan.down_at + k * plan.ip + c, kCols, sums + k * kCols);
    const DType dtype = grads.w_down.dtype;
    narrow(sums, kCols, b.r, count, {at<char>(grads.w_down, 0) + c * element_bytes(dtype), dtype, b.d_in}, 0);
  }
  if (p == 0 && grads.b_down) {
    total(plan.b_down_at, plan.rp, sums);
    narrow(sums, plan.rp, 1, b.r, grads.b_down, 0);
  }
}

void clear(const Rows& m, int64_t count) {
  if (m) std::memset(m.data, 0, static_cast<size_t>(count * element_bytes(m.dtype)));
}

template <typename C, typename P, typename X>
void backward(const AdapterBankBackward& b) {
  constexpr int64_t kCols = kTileCols<C>;
  BackwardPlan<C> plan(b);
  const TaskOrder& order = plan.order;
  const int threads = plan.threads;
  const int64_t tiles_size = plan.block * (2 * plan.ldz + scratch_stride<C>(b.d_out) + 2 * scratch_stride<C>(b.d_in)) +
                             steps<P>(plan.block) * kCols;
  const int64_t up_depth = steps<P>(b.d_out), depth = steps<P>(b.r), down_at = plan.rp * up_depth;
  const int64_t sums_size = (b.r + 1) * kCols + plan.rp, packed_size = down_at + plan.ip * depth;
  const int64_t up_panels = plan.rp / kCols, panels = up_panels + plan.ip / kCols;
  const int64_t finished = (plan.op + plan.ip) / kCols;
  const auto present = static_cast<int64_t>(order.present.size());
  const bool sums_wanted = plan.up || plan.down || plan.b_down;
  using W = Workspace;
  Workspace work(W::bytes<C>(plan.op) + W::bytes<C>(present * packed_size) + W::bytes<C>(threads * tiles_size) +
                 W::bytes<C>(threads * sums_size) + W::bytes<C>(2 * threads * plan.partial_size));
  C* scales = work.take<C>(plan.op);
  P* packed = work.take<P>(present * packed_size);
  C* tiles = work.take<C>(threads * tiles_size);
  C* all_sums = work.take<C>(threads * sums_size);
  C* partials = work.take<C>(2 * threads * plan.partial_size);
  std::vector<Spans> team_spans = spans_of(threads, plan.block);

  if (b.dx) advise_huge_pages(b.dx.data, plan.n * b.dx.stride * static_cast<int64_t>(sizeof(X)));
  for (int64_t c = 0; c < plan.op; ++c) scales[c] = static_cast<C>(b.scale);
  for (int64_t t = 0; t < b.tasks; ++t) {
    if (order.first[t] < order.first[t + 1]) continue;
    clear(b.gradients[t].w_down, b.r * b.d_in), clear(b.gradients[t].b_down, b.r);
    clear(b.gradients[t].w_up, b.d_out * b.r), clear(b.gradients[t].b_up, b.d_out);
  }

#pragma omp parallel num_threads(threads)
  {
#pragma omp single nowait
    plan.threads = omp_get_num_threads();  // the team may be smaller than asked for
#pragma omp for
    for (int64_t i = 0; i < present * panels; ++i) {
      const Adapter& a = b.adapters[order.present[i / panels]];
      P* to = packed + i / panels * packed_size;
      const int64_t p = i % panels * kCols, down = p - plan.rp;
      if (down < 0) {
        pack_rows(a.w_up, p, b.r, b.d_out, scales, to + p * up_depth);
      } else {
        pack_rows(a.w_down, down, b.d_in, b.r, nullptr, to + down_at + down * depth);
      }
    }

    const int me = omp_get_thread_num();
    C* sums = all_sums + me * sums_size;
    Spans& spans = team_spans[static_cast<size_t>(me)];
    order.for_tasks(share(plan.n, me, plan.threads), [&](int64_t i, int64_t begin, int64_t end) {
      const int64_t task = order.present[i];
      const P *w_up = packed + i * packed_size, *w_down = w_up + down_at;
      C* partial = plan.partial(partials, me, task);
      for (int64_t place = begin, rows; place < end; place += rows) {
        rows = order.block(place, end, plan.block, spans);
        backward_block<C, P, X>(plan, b.gradients[task], spans, rows, place == begin, w_up, w_down, tiles + me * tiles_size,
                             partial);
      }
      const bool whole = begin == order.first[task] && end == order.first[task + 1];
      for (int64_t p = 0; sums_wanted && whole && p < finished; ++p) finish_panel(plan, task, partials, p, sums);
    });
#pragma omp barrier
    for (int64_t task : order.present) {
      const auto [first, last] = plan.threads_of(task);
      if (!sums_wanted || first == last) continue;
#pragma omp for nowait
      for (int64_t p = 0; p < finished; ++p) finish_panel(plan, task, partials, p, sums);
    }
  }
}

}  // namespace

void adapter_bank_forward(const AdapterBankForward& f) {
  if (f.y.dtype == DType::kFloat64) return forward<double, double, double>(f);
#if defined(__AVX512BF16__)
  if (are_bf16({f.x, f.y})) return forward<float, Pair, bf16>(f);
  if (are_bf16({f.x}) && f.y.dtype == DType::kFloat32) return forward<float, Pair, float>(f);  // so is the residual
#endif
  with_storage<float>(f.y.dtype, [&](auto* y) { forward<float, float, std::remove_pointer_t<decltype(y)>>(f); });
}

void adapter_bank_backward(const AdapterBankBackward& b) {
  // As of bottleneck_backward: without dx its type does not matter.
  const DType dtype = b.dx ? b.dx.dtype : b.g.dtype;
  if (dtype == DType::kFloat64) return backward<double, double, double>(b);
#if defined(__AVX512BF16__)
  if (are_bf16({b.x, b.z, b.dx}) && (b.z || are_bf16({b.g}))) return backward<float, Pair, bf16>(b);
#endif
  with_storage<float>(dtype, [&](auto* x) { backward<float, float, std::remove_pointer_t<decltype(x)>>(b); });
}

}  // namespace petl::PETL_ISA
