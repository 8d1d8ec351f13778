// The bottleneck adapter: each thread walks blocks of rows, and everything between reading x and writing y (or between
// reading g and x and writing dx) stays in its L2 cache. Compiled once per instruction set.
#include <omp.h>

#include "blocks.h"
#include "bottleneck_rows.h"
#include "pages.h"

namespace petl::PETL_ISA {
namespace {

// The dropout factors and the gate of one block of rows, and where that keeps them.
template <typename C, typename Call>
Modifiers<C> modifiers(const Call& call, int64_t row, int64_t rows, int64_t ld, C* factors, C* gate) {
  if (call.dropout) dropout_factors(call.dropout, row, rows, call.r, factors, ld);
  if (call.gate) widen(call.gate, row, rows, 1, gate, 1);
  return {call.dropout ? factors : nullptr, call.gate ? gate : nullptr};
}

template <typename C, typename P, typename Y>
void forward(const BottleneckForward& f) {
  constexpr int64_t kCols = kTileCols<C>;
  const int64_t rp = round_up(f.r, kCols), dp = round_up(f.d_out, kCols), block = block_rows(f.d_in);
  // A gate multiplies the bias too, which then is one more row of w_up^T, the gate standing beside h.
  const bool gated_bias = f.gate && f.b_up;
  const int64_t down_depth = steps<P>(f.d_in), depth = steps<P>(f.r + gated_bias);
  const int threads = useful_threads(f.threads, f.n, 2 * f.n * f.d_in * f.r);
  const int64_t ldz = rp + kLanes<C>, z_size = block * ldz, x_size = block * scratch_stride<C>(f.d_in);
  const int64_t factors_size = f.dropout ? z_size : 0, tiles_size = z_size + x_size + factors_size + block;
  using W = Workspace;
  Workspace work(W::bytes<P>(rp * down_depth) + W::bytes<P>(depth * dp) + W::bytes<C>(rp) + 2 * W::bytes<C>(dp) +
                 W::bytes<C>(threads * tiles_size));
  P* down = work.take<P>(rp * down_depth);
  P* up = work.take<P>(depth * dp);
  C* b_down = work.take<C>(rp);
  C* b_up = work.take<C>(dp);
  C* scales = work.take<C>(dp);
  C* scratch = work.take<C>(threads * tiles_size);

  advise_huge_pages(f.y.data, f.n * f.y.stride * static_cast<int64_t>(sizeof(Y)));
  fill_scales(f.scale, f.scale_size, f.alpha, f.d_out, scales);
  std::memset(b_down, 0, sizeof(C) * rp);
  std::memset(b_up, 0, sizeof(C) * dp);
  if (f.b_down) widen(f.b_down, 0, 1, f.r, b_down, rp);
  if (f.b_up) widen(f.b_up, 0, 1, f.d_out, b_up, dp);
  for (int64_t c = 0; c < f.d_out; ++c) b_up[c] *= scales[c];

#pragma omp parallel num_threads(threads)
  {
#pragma omp for nowait
    for (int64_t p = 0; p < rp; p += kCols) pack_transposed(f.w_down, p, f.r, f.d_in, nullptr, down + p * down_depth);
#pragma omp for
    for (int64_t p = 0; p < dp; p += kCols) {
      pack_transposed(f.w_up, p, f.d_out, f.r, scales, up + p * depth);
      for (int64_t j = 0; gated_bias && j < kCols; ++j) put(up + p * depth, f.r, j, b_up[p + j]);
    }

    const int me = omp_get_thread_num();
    C *z = scratch + me * tiles_size, *x_tile = z + z_size, *factors = x_tile + x_size, *gate = factors + factors_size;
    const Range range = share(f.n, me, omp_get_num_threads());  // the team may be smaller than asked for
    for (int64_t row = range.begin; row < range.end; row += block) {
      const int64_t rows = range.end - row < block ? range.end - row : block;
      const Operand<P> x = operand(f.x, row, rows, f.d_in, reinterpret_cast<P*>(x_tile));
      deep_product<C>(rows, f.r, down_depth, x, down, z, ldz, b_down);
      if (f.activation == Activation::kSoftmax) softmax_rows(z, rows, ldz, f.r);
      if (f.z) narrow(z, ldz, rows, f.r, f.z, row);
      activate_rows(f.activation, z, rows, ldz, f.r, modifiers(f, row, rows, ldz, factors, gate));
      for (int64_t i = 0; gated_bias && i < rows; ++i) z[i * ldz + f.r] = gate[i];
      const Operand<P> h = left_operand<P>(z, rows, ldz, f.r + gated_bias);
      Y* y = static_cast<Y*>(f.y.data) + row * f.y.stride;
      const Y* add = f.residual ? static_cast<const Y*>(f.residual.data) + row * f.residual.stride : nullptr;
      gemm<C, Y, false, P>({rows, f.d_out, depth, h.data, h.ld, up, kCols, depth * kCols, y, f.y.stride, add,
                            f.residual.stride, gated_bias ? nullptr : b_up});
    }
  }
}

// What the backward accumulates over rows, per thread: up[k, c] = sum h[n, k] g[n, c], with the row k = r summing g
// itself (a column of ones beside h, or of the gate), down[k, c] = sum dz[n, k] x[n, c], and b_down[k] = sum dz[n, k].
template <typename C>
struct Partial {
  C *up, *down, *b_down;
};

// Which products a backward needs, and the sizes of its scratch.
template <typename C>
struct BackwardPlan {
  static constexpr int64_t kCols = kTileCols<C>;
  bool up, down, dz, gated_bias;  // dw_up or what follows from it; dw_down; anything behind dz; b_up's part of dgate
  int64_t up_rows, rp, op, ip, ldz, block, factors_size;
  int threads;

  explicit BackwardPlan(const BottleneckBackward& b)
      : up(b.dw_up || b.dscale || b.db_up),
        down(static_cast<bool>(b.dw_down)),
        dz(b.dx || b.dw_down || b.db_down || b.dgate),
        gated_bias(b.dgate && b.b_up),
        up_rows(b.dw_up || b.dscale ? b.r + 1 : 1),
        rp(round_up(b.r + gated_bias, kCols)),
        op(round_up(b.d_out, kCols)),
        ip(round_up(b.d_in, kCols)),
        ldz(round_up(b.r + 1, kCols) + kLanes<C>),
        block(block_rows(b.d_in)),
        factors_size(b.dropout ? h_size() : 0),
        threads(useful_threads(b.threads, b.n, 4 * b.n * b.d_in * b.r)) {}

  int64_t h_size() const { return block * ldz; }
  int64_t tile_size(int64_t d) const { return block * scratch_stride<C>(d); }
  int64_t partial_size() const { return up_rows * op + (down ? rp * ip : 0) + rp; }
};

// dh, dz, dx and the partial sums of one block of rows.
template <typename C, typename P, typename X>
void backward_block(const BottleneckBackward& b, const BackwardPlan<C>& plan, int64_t row, int64_t rows, bool first,
                    const P* w_up, const P* w_down, C* scratch, const Partial<C>& partial) {
  constexpr int64_t kCols = kTileCols<C>;
  const int64_t ldz = plan.ldz, depth = steps<P>(b.r);
  C *h = scratch, *dz = h + plan.h_size(), *g_tile = dz + plan.h_size(), *x_tile = g_tile + plan.tile_size(b.d_out);
  C *factors = x_tile + plan.tile_size(b.d_in), *gate = factors + plan.factors_size, *dgate = gate + plan.block;
  P* panel = reinterpret_cast<P*>(dgate + plan.block);
  const Operand<P> g = operand(b.g, row, rows, b.d_out, reinterpret_cast<P*>(g_tile));
  if (b.z) widen(b.z, row, rows, b.r, h, ldz);
  const Modifiers<C> m = modifiers(b, row, rows, ldz, factors, gate);
  if (plan.dz) {
    // dgate sums its columns, which eager does the other way round, over d_out last: with one chain of d_out = 48
    // additions per column, at r = 70, its error was 1.7 times eager's.
    deep_product<C, P>(rows, b.r + plan.gated_bias, steps<P>(b.d_out), g, w_up, dz, ldz, nullptr, {},
                       static_cast<bool>(b.dgate));
    for (int64_t i = 0; b.dgate && i < rows; ++i) dgate[i] = plan.gated_bias ? dz[i * ldz + b.r] : C(0);
    differentiate_rows(b.activation, h, dz, rows, ldz, b.r, m, b.dgate ? dgate : nullptr);
    if (b.dgate) narrow(dgate, 1, rows, 1, b.dgate, row);
  } else if (b.z) {
    activate_rows(b.activation, h, rows, ldz, b.r, m);
  }
  if (plan.up) {
    for (int64_t i = 0; i < rows; ++i) h[i * ldz + b.r] = m.gate ? m.gate[i] : C(1);
    const P* left = left_transposed<P>(h, rows, ldz, b.r + 1, h) + (plan.up_rows == 1 ? b.r : 0);
    add_row_products(plan.up_rows, b.d_out, rows, left, ldz, g, panel, partial.up, first);
  }
  if (plan.down) {
    const Operand<P> x = operand(b.x, row, rows, b.d_in, reinterpret_cast<P*>(x_tile));
    const P* left = left_transposed<P>(dz, rows, ldz, b.r, h);  // h is done with
    add_row_products(b.r, b.d_in, rows, left, ldz, x, panel, partial.down, first);
  }
  if (b.db_down) {
    // The block's own sum first: one chain over 1000 rows was less accurate than twice eager's error.
    for (int64_t k = 0; k < b.r; k += kLanes<C>) {
      Vec<C> sum = {};
      for (int64_t i = 0; i < rows; ++i) sum += load_raw<Vec<C>>(dz + i * ldz + k);
      C* total = partial.b_down + k;
      Storage<C, C>::store(total, first ? sum : load_raw<Vec<C>>(total) + sum);
    }
  }
  if (b.dx) {
    X* dx = static_cast<X*>(b.dx.data) + row * b.dx.stride;
    const X* add = b.add_g ? static_cast<const X*>(b.g.data) + row * b.g.stride : nullptr;
    const Operand<P> left = left_operand<P>(dz, rows, ldz, b.r);
    gemm<C, X, false, P>({rows, b.d_in, depth, left.data, left.ld, w_down, kCols, depth * kCols, dx, b.dx.stride, add,
                          b.g.stride, nullptr});
  }
}

// The gradients of output channels [first, first + count): rows of dw_up, elements of db_up and dscale.
template <typename C>
void finish_up(const BottleneckBackward& b, const BackwardPlan<C>& plan, const C* partials, int64_t first, int64_t count,
               const C* scales, C* sums, C* w_row, C* dscale) {
  constexpr int64_t kCols = kTileCols<C>;
  for (int64_t k = 0; k < plan.up_rows; ++k) {
    sum_partials(partials + k * plan.op + first, plan.partial_size(), plan.threads, count, sums + k * kCols);
  }
  const C* g_sum = sums + (plan.up_rows - 1) * kCols;
  for (int64_t c = 0; c < count; ++c) {
    const C scaled = scales[first + c] * g_sum[c];
    if (b.db_up) narrow(&scaled, 1, 1, 1, {static_cast<char*>(b.db_up.data), b.db_up.dtype, 1}, first + c);
    if (b.dscale) {
      C bias = 0;
      if (b.b_up) widen({b.b_up.data, b.b_up.dtype, 1}, first + c, 1, 1, &bias, 1);
      widen(b.w_up, first + c, 1, b.r, w_row, b.r);
      double value = static_cast<double>(bias) * g_sum[c];
      for (int64_t k = 0; k < b.r; ++k) value += static_cast<double>(w_row[k]) * sums[k * kCols + c];
      dscale[first + c] = static_cast<C>(b.alpha * value);
    }
    if (b.dw_up) {
      for (int64_t k = 0; k < b.r; ++k) w_row[k] = scales[first + c] * sums[k * kCols + c];
      narrow(w_row, b.r, 1, b.r, b.dw_up, first + c);
    }
  }
}

template <typename C, typename P, typename X>
void backward(const BottleneckBackward& b) {
  constexpr int64_t kCols = kTileCols<C>;
  BackwardPlan<C> plan(b);
  const int threads = plan.threads;
  const int64_t tiles_size = 2 * plan.h_size() + plan.tile_size(b.d_out) + plan.tile_size(b.d_in) + plan.factors_size +
                             2 * plan.block + steps<P>(plan.block) * kCols;
  const int64_t up_depth = steps<P>(b.d_out), depth = steps<P>(b.r);
  const int64_t sums_size = (plan.up_rows + 1) * kCols + plan.rp;
  using W = Workspace;
  Workspace work(W::bytes<P>(plan.rp * up_depth) + W::bytes<P>(plan.ip * depth) + 2 * W::bytes<C>(plan.op) +
                 W::bytes<C>(threads * tiles_size) + W::bytes<C>(threads * sums_size) +
                 W::bytes<C>(threads * plan.partial_size()));
  P* w_up = work.take<P>(plan.rp * up_depth);
  P* w_down = work.take<P>(plan.ip * depth);
  C* scales = work.take<C>(plan.op);
  C* dscale = work.take<C>(plan.op);
  C* tiles = work.take<C>(threads * tiles_size);
  C* all_sums = work.take<C>(threads * sums_size);
  C* partials = work.take<C>(threads * plan.partial_size());
  const int64_t down_at = plan.up_rows * plan.op, b_down_at = down_at + (plan.down ? plan.rp * plan.ip : 0);

  if (b.dx) advise_huge_pages(b.dx.data, b.n * b.dx.stride * static_cast<int64_t>(sizeof(X)));
  fill_scales(b.scale, b.scale_size, b.alpha, b.d_out, scales);

#pragma omp parallel num_threads(threads)
  {
#pragma omp single nowait
    plan.threads = omp_get_num_threads();  // the team may be smaller than asked for
    if (plan.dz) {
#pragma omp for nowait
      for (int64_t p = 0; p < plan.rp; p += kCols) {
        P* panel = w_up + p * up_depth;
        pack_rows(b.w_up, p, b.r, b.d_out, scales, panel);
        if (plan.gated_bias && b.r < p + kCols) {  // the last: g . (scale b_up) comes out of the product beside dh
          for (int64_t c = 0; c < b.d_out; ++c) {
            C bias;
            widen({b.b_up.data, b.b_up.dtype, 1}, c, 1, 1, &bias, 1);
            put(panel, c, b.r - p, scales[c] * bias);
          }
        }
      }
#pragma omp for nowait
      for (int64_t p = 0; p < plan.ip; p += kCols) pack_rows(b.w_down, p, b.d_in, b.r, nullptr, w_down + p * depth);
    }
#pragma omp barrier
    const int me = omp_get_thread_num();
    C* mine = partials + me * plan.partial_size();
    const Partial<C> partial{mine, mine + down_at, mine + b_down_at};
    const Range range = share(b.n, me, plan.threads);
    if (range.begin == range.end) std::memset(mine, 0, sizeof(C) * plan.partial_size());
    for (int64_t row = range.begin; row < range.end; row += plan.block) {
      const int64_t rows = range.end - row < plan.block ? range.end - row : plan.block;
      backward_block<C, P, X>(b, plan, row, rows, row == range.begin, w_up, w_down, tiles + me * tiles_size, partial);
    }
#pragma omp barrier
    C *sums = all_sums + me * sums_size, *w_row = sums + (plan.up_rows + 1) * kCols;
    if (plan.up) {
#pragma omp for nowait
      for (int64_t c = 0; c < b.d_out; c += kCols) {
        const int64_t count = b.d_out - c < kCols ? b.d_out - c : kCols;
        finish_up(b, plan, partials, c, count, scales, sums, w_row, dscale);
      }
    }
    if (plan.down) {
#pragma omp for nowait
      for (int64_t k = 0; k < b.r; ++k) {
        C* row = partials + down_at + k * plan.ip;  // summed in place, into the first partial
        sum_partials(row, plan.partial_size(), plan.threads, b.d_in, row);
        narrow(row, plan.ip, 1, b.d_in, b.dw_down, k);
      }
    }
  }
  if (b.db_down) {
    C* row = partials + b_down_at;
    sum_partials(row, plan.partial_size(), plan.threads, b.r, row);
    narrow(row, b.r, 1, b.r, b.db_down, 0);
  }
  if (b.dscale && b.scale_size == 1) {
    double sum = 0;  // in double here and above: a chain of d_out or r floats would be most of its error
    for (int64_t c = 0; c < b.d_out; ++c) sum += dscale[c];
    dscale[0] = static_cast<C>(sum);
  }
  if (b.dscale) narrow(dscale, b.d_out, 1, b.scale_size, b.dscale, 0);
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
