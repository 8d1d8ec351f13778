// The bottleneck inside a larger kernel: packed weights, activations of a block, and the gradients of its parameters
// from blocks of the gradient of its output.
#pragma once

#include <omp.h>

#include "blocks.h"
#include "bottleneck_rows.h"

namespace petl::PETL_ISA {

// y = s (h w_up^T + b_up) for blocks of h: the scaled weight in panels, and the scaled bias.
template <typename C>
class UpProjection {
 public:
  UpProjection(int64_t r, int64_t d_out) : r_(r), d_out_(d_out), padded_(round_up(d_out, kTileCols<C>)) {}
  int64_t bytes() const { return Workspace::bytes<C>(r_ * padded_) + 2 * Workspace::bytes<C>(padded_); }

  void take(Workspace& work, const Rows& b_up, const Rows& scale, int64_t scale_size, double alpha) {
    panels_ = work.take<C>(r_ * padded_), bias_ = work.take<C>(padded_), scales_ = work.take<C>(padded_);
    fill_scales(scale, scale_size, alpha, d_out_, scales_);
    std::memset(bias_, 0, sizeof(C) * static_cast<size_t>(padded_));
    if (b_up) widen(b_up, 0, 1, d_out_, bias_, padded_);
    for (int64_t c = 0; c < d_out_; ++c) bias_[c] *= scales_[c];
  }
  void pack(const Rows& w_up) {  // by the whole team; the caller waits for it
#pragma omp for nowait
    for (int64_t p = 0; p < padded_; p += kTileCols<C>) {
      pack_transposed<C>(w_up, p, d_out_, r_, scales_, panels_ + p * r_);
    }
  }
  // out = what it gives for `rows` rows of h (+ add).
  void project(int64_t rows, const C* h, int64_t ldh, C* out, int64_t ldo, Operand<C> add) const {
    gemm<C, C>({rows, d_out_, r_, h, ldh, panels_, kTileCols<C>, r_ * kTileCols<C>, out, ldo, add.data, add.ld, bias_});
  }

 private:
  int64_t r_, d_out_, padded_;
  C *panels_ = nullptr, *bias_ = nullptr, *scales_ = nullptr;
};

// z = x w_down^T + b_down for blocks of x.
template <typename C>
class DownProjection {
 public:
  DownProjection(int64_t r, int64_t d_in) : r_(r), d_in_(d_in), padded_(round_up(r, kTileCols<C>)) {}
  int64_t bytes() const { return Workspace::bytes<C>(padded_ * d_in_) + Workspace::bytes<C>(padded_); }

  void take(Workspace& work, const Rows& b_down) {
    panels_ = work.take<C>(padded_ * d_in_), bias_ = work.take<C>(padded_);
    std::memset(bias_, 0, sizeof(C) * static_cast<size_t>(padded_));
    if (b_down) widen(b_down, 0, 1, r_, bias_, padded_);
  }
  void pack(const Rows& w_down) {  // by the whole team; the caller waits for it
#pragma omp for nowait
    for (int64_t p = 0; p < padded_; p += kTileCols<C>) {
      pack_transposed<C>(w_down, p, r_, d_in_, nullptr, panels_ + p * d_in_);
    }
  }
  void project(int64_t rows, Operand<C> x, C* z, int64_t ldz) const {
    deep_product<C>(rows, r_, d_in_, x, panels_, z, ldz, bias_);
  }

 private:
  int64_t r_, d_in_, padded_;
  C *panels_ = nullptr, *bias_ = nullptr;
};

// What one thread accumulates over its rows: up[k, c] = sum h[n, k] g[n, c], with the row k = r summing g itself (a
// column of ones beside h), down[k, c] = sum dz[n, k] x[n, c], and b_down[k] = sum dz[n, k].
//
// A class of the backward: sizes at first, memory by `take`, panels by `pack`, then `add` block by block and thread by
// thread, and `finish_up` and `sum_down` by the whole team once every thread has added its last.
template <typename C>
class BottleneckGradients {
 public:
  // `down` and `dz`: whether sum dz x, and anything behind dz, is wanted; what of the rest is, `b` says itself.
  BottleneckGradients(const BottleneckBackward& b, bool down, bool dz, int64_t block, int threads)
      : b_(b), up_(b.dw_up || b.dscale || b.db_up), down_(down), dz_(dz),
        up_rows_(b.dw_up || b.dscale ? b.r + 1 : 1), rp_(round_up(b.r, kCols)), op_(round_up(b.d_out, kCols)),
        ip_(round_up(b.d_in, kCols)), block_(block), threads_(threads) {}

  // The scratch of a block: h = act(z) and dz, each of `block` rows.
  int64_t ld() const { return round_up(b_.r + 1, kCols) + kLanes<C>; }
  int64_t bytes() const {
    using W = Workspace;
    return W::bytes<C>(rp_ * b_.d_out) + W::bytes<C>(ip_ * b_.r) + W::bytes<C>(op_) +
           W::bytes<C>(threads_ * (sums_size() + 2 * block_ * ld() + partial_size()));
  }

  void take(Workspace& work) {
    w_up_ = work.take<C>(rp_ * b_.d_out), w_down_ = work.take<C>(ip_ * b_.r), dscale_ = work.take<C>(op_);
    per_thread_ = work.take<C>(threads_ * (sums_size() + 2 * block_ * ld() + partial_size()));
  }

  // By the whole team, which may be smaller than asked for; the caller waits for it.
  void pack(const C* scales) {
#pragma omp single nowait
    threads_ = omp_get_num_threads();
    if (!dz_) return;
#pragma omp for nowait
    for (int64_t p = 0; p < rp_; p += kCols) pack_rows<C>(b_.w_up, p, b_.r, b_.d_out, scales, w_up_ + p * b_.d_out);
#pragma omp for nowait
    for (int64_t p = 0; p < ip_; p += kCols) pack_rows<C>(b_.w_down, p, b_.d_in, b_.r, nullptr, w_down_ + p * b_.r);
  }

  C* h(int me) const { return partial(me) + partial_size(); }
  C* dz(int me) const { return h(me) + block_ * ld(); }
  void clear(int me) { std::memset(partial(me), 0, sizeof(C) * static_cast<size_t>(partial_size())); }

  // dz of rows [row, row + rows) and their part of every sum, from their g and x; x is read where sum dz x is wanted.
  void add(int me, int64_t row, int64_t rows, Operand<C> g, Operand<C> x) {
    C *h = this->h(me), *dz = this->dz(me), *up = partial(me), *down = up + down_at(), *b_down = up + b_down_at();
    widen(b_.z, row, rows, b_.r, h, ld());
    if (dz_) {
      deep_product<C>(rows, b_.r, b_.d_out, g, w_up_, dz, ld(), nullptr);
      differentiate_rows(b_.activation, h, dz, rows, ld(), b_.r);
    } else {
      activate_rows(b_.activation, h, rows, ld(), b_.r);
    }
    if (up_) {
      for (int64_t i = 0; i < rows; ++i) h[i * ld() + b_.r] = C(1);
      const C* left = h + (up_rows_ == 1 ? b_.r : 0);
      gemm<C, C, true>({up_rows_, op_, rows, left, ld(), g.data, g.ld, kCols, up, op_, up, op_, nullptr});
    }
    if (down_) {
      gemm<C, C, true>({b_.r, ip_, rows, dz, ld(), x.data, x.ld, kCols, down, ip_, down, ip_, nullptr});
    }
    if (dz_) {  // the block's own sum first: one chain over 1000 rows was less accurate than twice eager's error
      for (int64_t k = 0; k < b_.r; k += kLanes<C>) {
        Vec<C> sum = {};
        for (int64_t i = 0; i < rows; ++i) sum += load_raw<Vec<C>>(dz + i * ld() + k);
        Storage<C, C>::store(b_down + k, load_raw<Vec<C>>(b_down + k) + sum);
      }
    }
  }

  // out = dz w_down (+ add) for a block.
  void project_down(int me, int64_t rows, C* out, int64_t ldo, Operand<C> add) const {
    gemm<C, C>({rows, b_.d_in, b_.r, dz(me), ld(), w_down_, kCols, b_.r * kCols, out, ldo, add.data, add.ld, nullptr});
  }

  // dw_up, db_up and, channel by channel, dscale; by the whole team.
  void finish_up(int me, const C* scales) {
    if (!up_) return;
    C *sums = h(me) + 2 * block_ * ld(), *w_row = sums + (up_rows_ + 1) * kCols;
#pragma omp for nowait
    for (int64_t first = 0; first < b_.d_out; first += kCols) {
      const int64_t count = b_.d_out - first < kCols ? b_.d_out - first : kCols;
      for (int64_t k = 0; k < up_rows_; ++k) sum(k * op_ + first, count, sums + k * kCols);
      for (int64_t c = 0; c < count; ++c) finish_channel(first + c, scales[first + c], sums + c, w_row);
    }
  }

  // Every thread's sum dz x into that of thread 0, and sum dz too; by the whole team. `down_row` then reads them.
  void sum_down() {
#pragma omp for nowait
    for (int64_t k = 0; k < (down_ ? b_.r : 0); ++k) sum(down_at() + k * ip_, b_.d_in, partial(0) + down_at() + k * ip_);
#pragma omp single nowait
    if (dz_) sum(b_down_at(), b_.r, partial(0) + b_down_at());
  }
  C* down_row(int64_t k) { return partial(0) + down_at() + k * ip_; }
  const C* dz_sum() { return partial(0) + b_down_at(); }

  // db_down and dscale, after the team has met.
  void finish() {
    if (b_.db_down) narrow(dz_sum(), b_.r, 1, b_.r, b_.db_down, 0);
    if (!b_.dscale) return;
    if (b_.scale_size == 1) {
      double total = 0;
      for (int64_t c = 0; c < b_.d_out; ++c) total += static_cast<double>(dscale_[c]);
      dscale_[0] = static_cast<C>(total);
    }
    narrow(dscale_, b_.d_out, 1, b_.scale_size, b_.dscale, 0);
  }

 private:
  static constexpr int64_t kCols = kTileCols<C>;

  int64_t down_at() const { return up_rows_ * op_; }
  int64_t b_down_at() const { return down_at() + (down_ ? rp_ * ip_ : 0); }
  int64_t partial_size() const { return b_down_at() + rp_; }
  int64_t sums_size() const { return (up_rows_ + 1) * kCols + rp_; }
  C* partial(int me) const { return per_thread_ + me * (partial_size() + 2 * block_ * ld() + sums_size()); }
  void sum(int64_t at, int64_t count, C* sums) const {
    sum_partials(partial(0) + at, partial(1) - partial(0), threads_, count, sums);
  }

  // The gradients of one output channel; sums[k kCols] is its sum h_k g, that of k = up_rows - 1 its sum g.
  void finish_channel(int64_t c, C scale, const C* sums, C* w_row) {
    const C g_sum = sums[(up_rows_ - 1) * kCols], scaled = scale * g_sum;
    if (b_.db_up) narrow(&scaled, 1, 1, 1, {static_cast<char*>(b_.db_up.data), b_.db_up.dtype, 1}, c);
    if (b_.dscale) {
      C bias = 0;
      double value = 0;  // terms of both signs, whose sum may be far smaller than they
      if (b_.b_up) widen({b_.b_up.data, b_.b_up.dtype, 1}, c, 1, 1, &bias, 1);
      widen(b_.w_up, c, 1, b_.r, w_row, b_.r);
      for (int64_t k = 0; k < b_.r; ++k) value += static_cast<double>(w_row[k]) * sums[k * kCols];
      dscale_[c] = static_cast<C>(b_.alpha * (value + static_cast<double>(bias) * g_sum));
    }
    if (b_.dw_up) {
      for (int64_t k = 0; k < b_.r; ++k) w_row[k] = scale * sums[k * kCols];
      narrow(w_row, b_.r, 1, b_.r, b_.dw_up, c);
    }
  }

  const BottleneckBackward& b_;
  bool up_, down_, dz_;
  int64_t up_rows_, rp_, op_, ip_, block_;
  int threads_;
  C *w_up_ = nullptr, *w_down_ = nullptr, *dscale_ = nullptr, *per_thread_ = nullptr;
};

}  // namespace petl::PETL_ISA
