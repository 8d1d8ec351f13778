// The bottleneck inside the kernels that have one: what happens to a block of rows between x and y, and the gradients of
// its parameters, and dx, from blocks of the gradient of its output. C is the type computed in, P that of the products'
// operands (pairs.h).
//
// Both classes are used in the same order: sizes at first, memory by `take`, panels by `pack`, then block by block and
// thread by thread.
#pragma once

#include "blocks.h"
#include "bottleneck_rows.h"

namespace petl::PETL_ISA {

// The dropout factors and the gate of one block of rows, and where that keeps them.
template <typename C, typename Call>
Modifiers<C> modifiers(const Call& call, int64_t row, int64_t rows, int64_t ld, C* factors, C* gate) {
  if (call.dropout) dropout_factors(call.dropout, row, rows, call.r, factors, ld);
  if (call.gate) widen(call.gate, row, rows, 1, gate, 1);
  return {call.dropout ? factors : nullptr, call.gate ? gate : nullptr};
}

template <typename C, typename P>
class Bottleneck {
 public:
  Bottleneck(const BottleneckForward& f, int64_t block, int threads)
      : f_(f), gated_bias_(f.gate && f.b_up), rp_(round_up(f.r, kCols)), dp_(round_up(f.d_out, kCols)),
        down_depth_(steps<P>(f.d_in)), depth_(steps<P>(f.r + gated_bias_)), ldz_(rp_ + kLanes<C>), z_size_(block * ldz_),
        factors_size_(f.dropout ? z_size_ : 0), scratch_size_(z_size_ + factors_size_ + block), threads_(threads) {}

  int64_t bytes() const {
    using W = Workspace;
    return W::bytes<P>(rp_ * down_depth_) + W::bytes<P>(depth_ * dp_) + W::bytes<C>(rp_) + 2 * W::bytes<C>(dp_) +
           W::bytes<C>(threads_ * scratch_size_);
  }

  void take(Workspace& work) {
    down_ = work.take<P>(rp_ * down_depth_), up_ = work.take<P>(depth_ * dp_);
    b_down_ = work.take<C>(rp_), b_up_ = work.take<C>(dp_), scales_ = work.take<C>(dp_);
    scratch_ = work.take<C>(threads_ * scratch_size_);
    fill_scales(f_.scale, f_.scale_size, f_.alpha, f_.d_out, scales_);
    std::memset(b_down_, 0, sizeof(C) * static_cast<size_t>(rp_));
    std::memset(b_up_, 0, sizeof(C) * static_cast<size_t>(dp_));
    if (f_.b_down) widen(f_.b_down, 0, 1, f_.r, b_down_, rp_);
    if (f_.b_up) widen(f_.b_up, 0, 1, f_.d_out, b_up_, dp_);
    for (int64_t c = 0; c < f_.d_out; ++c) b_up_[c] *= scales_[c];
  }

  // By the whole team, which meets at the end.
  void pack() {
#pragma omp for nowait
    for (int64_t p = 0; p < rp_; p += kCols) {
      pack_transposed(f_.w_down, p, f_.r, f_.d_in, nullptr, down_ + p * down_depth_);
    }
#pragma omp for
    for (int64_t p = 0; p < dp_; p += kCols) {
      pack_transposed(f_.w_up, p, f_.d_out, f_.r, scales_, up_ + p * depth_);
      for (int64_t j = 0; gated_bias_ && j < kCols; ++j) put(up_ + p * depth_, f_.r, j, b_up_[p + j]);
    }
  }

  // out = gate s (h w_up^T + b_up) (+ add) for rows [row, row + rows), from their x; z too, where it is kept.
  template <typename T>
  void project(int me, int64_t row, int64_t rows, Operand<P> x, T* out, int64_t ldo, Operand<T> add) const {
    C *z = scratch_ + me * scratch_size_, *factors = z + z_size_, *gate = factors + factors_size_;
    deep_product<C>(rows, f_.r, down_depth_, x, down_, z, ldz_, b_down_);
    if (f_.activation == Activation::kSoftmax) softmax_rows(z, rows, ldz_, f_.r);
    if (f_.z) narrow(z, ldz_, rows, f_.r, f_.z, row);
    activate_rows(f_.activation, z, rows, ldz_, f_.r, modifiers(f_, row, rows, ldz_, factors, gate));
    for (int64_t i = 0; gated_bias_ && i < rows; ++i) z[i * ldz_ + f_.r] = gate[i];
    const Operand<P> h = left_operand<P>(z, rows, ldz_, f_.r + gated_bias_);
    gemm<C, T, false, P>({rows, f_.d_out, depth_, h.data, h.ld, up_, kCols, depth_ * kCols, out, ldo, add.data, add.ld,
                          gated_bias_ ? nullptr : b_up_});
  }

 private:
  static constexpr int64_t kCols = kTileCols<C>;

  const BottleneckForward& f_;
  bool gated_bias_;  // a gate multiplies the bias too, which then is one more row of w_up^T, the gate standing beside h
  int64_t rp_, dp_, down_depth_, depth_, ldz_, z_size_, factors_size_, scratch_size_;
  int threads_;
  P *down_ = nullptr, *up_ = nullptr;
  C *b_down_ = nullptr, *b_up_ = nullptr, *scales_ = nullptr, *scratch_ = nullptr;
};

// What each thread accumulates over its rows: up[k, c] = sum h[n, k] g[n, c], with the row k = r summing g itself (a
// column of ones beside h, or of the gate), down[k, c] = sum dz[n, k] x[n, c], and b_down[k] = sum dz[n, k].
//
// A thread's blocks go through `add_up`, `add_down` (where sum dz x is wanted) and `input_gradient` (where dx is), in this
// order; then the whole team calls `finish_up` and `finish_down`, and one thread, after all of them, `finish`.
template <typename C, typename P>
class BottleneckGradients {
 public:
  // `down` and `dz`: whether sum dz x, and anything behind dz, is wanted; what of the rest is, `b` says itself.
  BottleneckGradients(const BottleneckBackward& b, bool down, bool dz, int64_t block, int threads)
      : b_(b), up_(b.dw_up || b.dscale || b.db_up), down_(down), dz_(dz), gated_bias_(b.dgate && b.b_up),
        up_rows_(b.dw_up || b.dscale ? b.r + 1 : 1), rp_(round_up(b.r + gated_bias_, kCols)), op_(round_up(b.d_out, kCols)),
        ip_(round_up(b.d_in, kCols)), up_depth_(steps<P>(b.d_out)), depth_(steps<P>(b.r)),
        ldz_(round_up(b.r + 1, kCols) + kLanes<C>), h_size_(block * ldz_), factors_size_(b.dropout ? h_size_ : 0),
        block_(block), scratch_size_(2 * h_size_ + factors_size_ + 2 * block + steps<P>(block) * kCols),
        sums_size_((up_rows_ + 1) * kCols + rp_), down_at_(up_rows_ * op_),
        b_down_at_(down_at_ + (down ? rp_ * ip_ : 0)), partial_size_(b_down_at_ + rp_), threads_(threads) {}

  int64_t bytes() const {
    using W = Workspace;
    return W::bytes<P>(rp_ * up_depth_) + W::bytes<P>(ip_ * depth_) + 2 * W::bytes<C>(op_) +
           W::bytes<C>(threads_ * scratch_size_) + W::bytes<C>(threads_ * sums_size_) + W::bytes<C>(threads_ * partial_size_);
  }

  void take(Workspace& work) {
    w_up_ = work.take<P>(rp_ * up_depth_), w_down_ = work.take<P>(ip_ * depth_);
    scales_ = work.take<C>(op_), dscale_ = work.take<C>(op_);
    scratch_ = work.take<C>(threads_ * scratch_size_), sums_ = work.take<C>(threads_ * sums_size_);
    partials_ = work.take<C>(threads_ * partial_size_);
    fill_scales(b_.scale, b_.scale_size, b_.alpha, b_.d_out, scales_);
  }

  // By the whole team, which may be smaller than asked for and meets at the end.
  void pack() {
#pragma omp single nowait
    threads_ = omp_get_num_threads();
    if (dz_) {
#pragma omp for nowait
      for (int64_t p = 0; p < rp_; p += kCols) {
        P* panel = w_up_ + p * up_depth_;
        pack_rows(b_.w_up, p, b_.r, b_.d_out, scales_, panel);
        if (gated_bias_ && b_.r < p + kCols) {  // the last: g . (scale b_up) comes out of the product beside dh
          for (int64_t c = 0; c < b_.d_out; ++c) put(panel, c, b_.r - p, scales_[c] * bias(c));
        }
      }
#pragma omp for nowait
      for (int64_t p = 0; p < ip_; p += kCols) pack_rows(b_.w_down, p, b_.d_in, b_.r, nullptr, w_down_ + p * depth_);
    }
#pragma omp barrier
  }

  // For a thread without rows.
  void clear(int me) { std::memset(partial(me), 0, sizeof(C) * static_cast<size_t>(partial_size_)); }

  // h and dz of rows [row, row + rows) from the gradient g of the output, and the sums of h, g and dz. `first`: these
  // are the thread's first rows.
  void add_up(int me, int64_t row, int64_t rows, bool first, Operand<P> g) {
    C *h = this->h(me), *dz = h + h_size_, *factors = dz + h_size_, *gate = factors + factors_size_, *dgate = gate + block_;
    if (b_.z) widen(b_.z, row, rows, b_.r, h, ldz_);
    const Modifiers<C> m = modifiers(b_, row, rows, ldz_, factors, gate);
    if (dz_) {
      // dgate sums its columns, which eager does the other way round, over d_out last: with one chain of d_out = 48
      // additions per column, at r = 70, its error was 1.7 times eager's.
      deep_product<C, P>(rows, b_.r + gated_bias_, up_depth_, g, w_up_, dz, ldz_, nullptr, {}, static_cast<bool>(b_.dgate));
      for (int64_t i = 0; b_.dgate && i < rows; ++i) dgate[i] = gated_bias_ ? dz[i * ldz_ + b_.r] : C(0);
      differentiate_rows(b_.activation, h, dz, rows, ldz_, b_.r, m, b_.dgate ? dgate : nullptr);
      if (b_.dgate) narrow(dgate, 1, rows, 1, b_.dgate, row);
      sum_dz(me, rows, first);
    } else if (b_.z) {
      activate_rows(b_.activation, h, rows, ldz_, b_.r, m);
    }
    if (up_) {
      for (int64_t i = 0; i < rows; ++i) h[i * ldz_ + b_.r] = m.gate ? m.gate[i] : C(1);
      const P* left = left_transposed<P>(h, rows, ldz_, b_.r + 1, h) + (up_rows_ == 1 ? b_.r : 0);
      add_row_products(up_rows_, b_.d_out, rows, left, ldz_, g, panel(me), partial(me), first);
    }
  }

  // sum dz x of the same rows.
  void add_down(int me, int64_t rows, bool first, Operand<P> x) {
    C *h = this->h(me), *dz = h + h_size_;
    const P* left = left_transposed<P>(dz, rows, ldz_, b_.r, h);  // h is done with
    add_row_products(b_.r, b_.d_in, rows, left, ldz_, x, panel(me), partial(me) + down_at_, first);
  }

  // out = dz w_down (+ add) of the same rows, of which dz is then lost.
  template <typename T>
  void input_gradient(int me, int64_t rows, T* out, int64_t ldo, Operand<T> add) const {
    const Operand<P> dz = left_operand<P>(h(me) + h_size_, rows, ldz_, b_.r);
    gemm<C, T, false, P>({rows, b_.d_in, depth_, dz.data, dz.ld, w_down_, kCols, depth_ * kCols, out, ldo, add.data, add.ld,
                          nullptr});
  }

  // dw_up, db_up and, channel by channel, dscale.
  void finish_up(int me) {
    if (!up_) return;
    C *sums = sums_ + me * sums_size_, *w_row = sums + (up_rows_ + 1) * kCols;
#pragma omp for nowait
    for (int64_t first = 0; first < b_.d_out; first += kCols) {
      const int64_t count = b_.d_out - first < kCols ? b_.d_out - first : kCols;
      for (int64_t k = 0; k < up_rows_; ++k) sum_threads(partials_ + k * op_ + first, count, sums + k * kCols);
      for (int64_t c = 0; c < count; ++c) finish_channel(first + c, sums + c, w_row);
    }
  }

  // f(k, row, sum) for each k with what all threads summed: row k of sum dz x, which stays where it is, and element k of
  // sum dz.
  template <typename F>
  void finish_down(F f) {
#pragma omp for nowait
    for (int64_t k = 0; k < (dz_ ? b_.r : 0); ++k) {
      C *row = partials_ + down_at_ + k * ip_, *sum = partials_ + b_down_at_ + k;
      if (down_) sum_threads(row, b_.d_in, row);
      sum_threads(sum, 1, sum);
      f(k, row, *sum);
    }
  }
  const C* down_row(int64_t k) const { return partials_ + down_at_ + k * ip_; }
  const C* dz_sum() const { return partials_ + b_down_at_; }

  // db_down and dscale.
  void finish() {
    if (b_.db_down) narrow(dz_sum(), b_.r, 1, b_.r, b_.db_down, 0);
    if (b_.dscale && b_.scale_size == 1) {
      double sum = 0;  // in double here and below: a chain of d_out or r floats would be most of its error
      for (int64_t c = 0; c < b_.d_out; ++c) sum += dscale_[c];
      dscale_[0] = static_cast<C>(sum);
    }
    if (b_.dscale) narrow(dscale_, b_.d_out, 1, b_.scale_size, b_.dscale, 0);
  }

 private:
  static constexpr int64_t kCols = kTileCols<C>;

  C* h(int me) const { return scratch_ + me * scratch_size_; }
  P* panel(int me) const { return reinterpret_cast<P*>(h(me) + 2 * h_size_ + factors_size_ + 2 * block_); }
  C* partial(int me) const { return partials_ + me * partial_size_; }
  void sum_threads(const C* partials, int64_t count, C* sums) const {
    sum_partials(partials, partial_size_, threads_, count, sums);
  }
  C bias(int64_t c) const {
    C value = 0;
    if (b_.b_up) widen(from_column(b_.b_up, c), 0, 1, 1, &value, 1);
    return value;
  }

  void sum_dz(int me, int64_t rows, bool first) {
    const C* dz = h(me) + h_size_;
    // The block's own sum first: one chain over 1000 rows was less accurate than twice eager's error.
    for (int64_t k = 0; k < b_.r; k += kLanes<C>) {
      Vec<C> sum = {};
      for (int64_t i = 0; i < rows; ++i) sum += load_raw<Vec<C>>(dz + i * ldz_ + k);
      C* total = partial(me) + b_down_at_ + k;
      Storage<C, C>::store(total, first ? sum : load_raw<Vec<C>>(total) + sum);
    }
  }

  // The gradients of one output channel; sums[k kCols] is its sum h_k g, that of k = up_rows - 1 its sum g.
  void finish_channel(int64_t c, const C* sums, C* w_row) {
    const C g_sum = sums[(up_rows_ - 1) * kCols], scaled = scales_[c] * g_sum;
    if (b_.db_up) narrow(&scaled, 1, 1, 1, from_column(b_.db_up, c), 0);
    if (b_.dscale) {
      widen(b_.w_up, c, 1, b_.r, w_row, b_.r);
      double value = static_cast<double>(bias(c)) * g_sum;
      for (int64_t k = 0; k < b_.r; ++k) value += static_cast<double>(w_row[k]) * sums[k * kCols];
      dscale_[c] = static_cast<C>(b_.alpha * value);
    }
    if (b_.dw_up) {
      for (int64_t k = 0; k < b_.r; ++k) w_row[k] = scales_[c] * sums[k * kCols];
      narrow(w_row, b_.r, 1, b_.r, b_.dw_up, c);
    }
  }

  const BottleneckBackward& b_;
  bool up_, down_, dz_, gated_bias_;  // gated_bias: b_up's part of dgate
  int64_t up_rows_, rp_, op_, ip_, up_depth_, depth_, ldz_, h_size_, factors_size_, block_, scratch_size_, sums_size_;
  int64_t down_at_, b_down_at_, partial_size_;
  int threads_;
  P *w_up_ = nullptr, *w_down_ = nullptr;
  C *scales_ = nullptr, *dscale_ = nullptr, *scratch_ = nullptr, *sums_ = nullptr, *partials_ = nullptr;
};

}  // namespace petl::PETL_ISA
