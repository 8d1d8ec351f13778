// The salient-channel module: each thread walks blocks of rows that stay in its L2 cache. The chosen columns of a block
// are gathered into a tile and go through the product; its rows are then copied, and the tile is scattered over the
// copy while that is in L1. Backward the same with g, beside M = g_C^T x_C. Compiled once per instruction set.
#include <omp.h>

#include "blocks.h"
#include "pages.h"

namespace petl::PETL_ISA {
namespace {

// Threads that pay for walking n rows: copying an element costs about 8 multiply-adds.
int threads_for(int threads, int64_t n, int64_t d, int64_t products) {
  return useful_threads(threads, n, n * (8 * d + products));
}

template <typename C>
C scale_of(const Rows& scale, double alpha) {
  C value = C(1);
  if (scale) widen<C>(scale, 0, 1, 1, &value, 1);
  return static_cast<C>(alpha) * value;
}

// out[i, j] = rows of `from` at channels[j].
template <typename S>
void gather(const S* from, int64_t stride, int64_t rows, const int64_t* channels, int64_t k, S* out, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < k; ++j) out[i * ld + j] = from[i * stride + channels[j]];
  }
}

// A copy of bits: what is not chosen comes out as it went in, the payload of a NaN included.
template <typename S>
PETL_INLINE void copy_row(const S* from, S* to, int64_t d) {
  using Raw = VectorOf<char>::type;
  constexpr int64_t kStep = kVectorBytes / static_cast<int64_t>(sizeof(S));
  int64_t c = 0;
  for (; c + kStep <= d; c += kStep) {
    const Raw v = load_raw<Raw>(from + c);
    std::memcpy(to + c, &v, sizeof(v));
  }
  std::memcpy(to + c, from + c, static_cast<size_t>(d - c) * sizeof(S));
}

// What is done to the rows of x (or of g, backward): to = from, and to_C = from_C panels + bias + carry * from_C.
template <typename C>
struct Transform {
  int64_t d, k, block, ld;
  const int64_t* channels;
  const C *panels, *bias;
  C carry;

  // Rows are held as stored, so that of 16 bits twice as many fit: 3-10 % faster than as many as of 32 (k = 96, 192).
  Transform(int64_t d, int64_t k, const int64_t* channels, int64_t element)
      : d(d),
        k(k),
        block(element == 2 ? 2 * block_rows(d) : block_rows(d)),
        ld(scratch_stride<C>(k)),
        channels(channels),
        panels(),
        bias(),
        carry(1) {}
  int64_t tile_size() const { return block * ld; }
};

// Scratch of one thread: `in` holds from_C as C, `raw` as stored (the same where that is C).
template <typename C>
struct Tiles {
  static constexpr int kCount = 4;
  C *raw, *in, *out, *extra;

  Tiles(C* scratch, int64_t size) : raw(scratch), in(raw + size), out(in + size), extra(out + size) {}
};

// from_C of `rows` rows as C, and, when `keep` is given, as stored in rows of k elements.
template <typename C, typename S>
Operand<C> chosen(const Transform<C>& t, const S* from, int64_t stride, int64_t rows, S* keep, const Tiles<C>& tiles) {
  S* raw = keep ? keep : reinterpret_cast<S*>(tiles.raw);
  const int64_t ld = keep ? t.k : t.ld;
  gather(from, stride, rows, t.channels, t.k, raw, ld);
  if constexpr (std::is_same_v<C, S>) {
    return {raw, ld};
  } else {
    constexpr DType kDType = std::is_same_v<S, bf16> ? DType::kBFloat16 : DType::kFloat16;
    widen<C>({raw, kDType, ld}, 0, rows, t.k, tiles.in, t.ld);
    return {tiles.in, t.ld};
  }
}

template <typename C, typename S>
void transform(const Transform<C>& t, const S* from, int64_t from_stride, int64_t rows, Operand<C> in,
               const Tiles<C>& tiles, S* to, int64_t to_stride) {
  Operand<C> add = in;
  if (t.carry != C(1)) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < t.k; ++j) tiles.extra[i * t.ld + j] = t.carry * in.data[i * in.ld + j];
    }
    add = {tiles.extra, t.ld};
  }
  deep_product<C>(rows, t.k, t.k, in, t.panels, tiles.out, t.ld, t.bias, add);
  const S* result;
  if constexpr (std::is_same_v<C, S>) {
    result = tiles.out;
  } else {
    constexpr DType kDType = std::is_same_v<S, bf16> ? DType::kBFloat16 : DType::kFloat16;
    narrow(tiles.out, t.ld, rows, t.k, {tiles.raw, kDType, t.ld}, 0);
    result = reinterpret_cast<const S*>(tiles.raw);
  }
  for (int64_t i = 0; i < rows; ++i) {
    S* row = to + i * to_stride;
    copy_row(from + i * from_stride, row, t.d);
    for (int64_t j = 0; j < t.k; ++j) row[t.channels[j]] = result[i * t.ld + j];
  }
}

template <typename C, typename S>
void forward(const ChannelAdapterForward& f) {
  constexpr int64_t kCols = kTileCols<C>;
  Transform<C> t(f.d, f.k, f.channels, sizeof(S));
  const int64_t kp = round_up(f.k, kCols), scratch_size = Tiles<C>::kCount * t.tile_size();
  const int threads = threads_for(f.threads, f.n, f.d, f.k * f.k);
  using W = Workspace;
  Workspace work(W::bytes<C>(kp * f.k) + 2 * W::bytes<C>(kp) + W::bytes<C>(threads * scratch_size));
  C* panels = work.take<C>(kp * f.k);
  C* bias = work.take<C>(kp);
  C* scales = work.take<C>(kp);
  C* scratch = work.take<C>(threads * scratch_size);

  advise_huge_pages(f.y.data, f.n * f.y.stride * static_cast<int64_t>(sizeof(S)));
  const C s = scale_of<C>(f.scale, f.alpha), inner = f.scale_input ? C(1) : s;
  t.panels = panels, t.bias = bias, t.carry = f.scale_input ? s : C(1);
  for (int64_t j = 0; j < kp; ++j) scales[j] = inner, bias[j] = C(0);
  if (f.bias) widen(f.bias, 0, 1, f.k, bias, kp);
  for (int64_t j = 0; j < f.k; ++j) bias[j] *= inner;

#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t p = 0; p < kp; p += kCols) pack_transposed<C>(f.weight, p, f.k, f.k, scales, panels + p * f.k);

    const int me = omp_get_thread_num();
    const Tiles<C> tiles(scratch + me * scratch_size, t.tile_size());
    const Range range = share(f.n, me, omp_get_num_threads());  // the team may be smaller than asked for
    for (int64_t row = range.begin; row < range.end; row += t.block) {
      const int64_t rows = range.end - row < t.block ? range.end - row : t.block;
      const S* x = static_cast<const S*>(f.x.data) + row * f.x.stride;
      S* keep = f.x_channels ? static_cast<S*>(f.x_channels.data) + row * f.k : nullptr;
      const Operand<C> in = chosen(t, x, f.x.stride, rows, keep, tiles);
      transform(t, x, f.x.stride, rows, in, tiles, static_cast<S*>(f.y.data) + row * f.y.stride, f.y.stride);
    }
  }
}

// What the backward accumulates over rows, per thread: m[i, j] = sum g_C[n, i] x_C[n, j], g[i] = sum g_C[n, i], and
// the trace of m.
template <typename C>
struct Partial {
  C *m, *g;
  double* trace;
};

// sum_j a[j] b[j] over k elements, in double: the products are exact.
template <typename C>
double dot(const C* a, const C* b, int64_t k) {
  double sums[8] = {}, sum = 0;
  int64_t j = 0;
  for (; j + 8 <= k; j += 8) {
    for (int i = 0; i < 8; ++i) sums[i] += static_cast<double>(a[j + i]) * static_cast<double>(b[j + i]);
  }
  for (; j < k; ++j) sum += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  for (double part : sums) sum += part;
  return sum;
}

template <typename C>
void accumulate(const ChannelAdapterBackward& b, int64_t row, int64_t rows, bool first, Operand<C> g, int64_t kp,
                bool products, const Partial<C>& partial, const Tiles<C>& tiles) {
  const bool trace = b.dscale && b.scale_input;
  const Operand<C> x = products || trace ? operand<C>(b.x_channels, row, rows, b.k, tiles.extra) : Operand<C>{};
  if (products) {
    gemm<C, C, true>({b.k, kp, rows, g.data, g.ld, x.data, x.ld, kTileCols<C>, partial.m, kp,
                      first ? nullptr : partial.m, kp, nullptr});
  }
  // Read off m in float, this sum over n and k had 3 to 15 times the error of eager's.
  for (int64_t i = 0; trace && i < rows; ++i) *partial.trace += dot(g.data + i * g.ld, x.data + i * x.ld, b.k);
  for (int64_t j = 0; j < b.k; j += kLanes<C>) {
    // The block's own sum first: one chain over all rows would lose digits.
    Vec<C> sum = {};
    for (int64_t i = 0; i < rows; ++i) sum += load_raw<Vec<C>>(g.data + i * g.ld + j);
    Storage<C, C>::store(partial.g + j, first ? sum : load_raw<Vec<C>>(partial.g + j) + sum);
  }
}

// Row i of dweight, element i of dbias, and what row i gives to dscale unless that is the trace of m; m [k] and g are
// summed over the threads.
template <typename C>
double finish_row(const ChannelAdapterBackward& b, int64_t i, C s, C* m, C g, C* weight_row) {
  const C inner = b.scale_input ? C(1) : s;
  double dscale = 0;
  if (b.dscale && !b.scale_input) {
    C bias = 0;
    if (b.bias) widen({b.bias.data, b.bias.dtype, 1}, i, 1, 1, &bias, 1);
    widen(b.weight, i, 1, b.k, weight_row, b.k);
    for (int64_t j = 0; j < b.k; ++j) dscale += static_cast<double>(weight_row[j]) * m[j];
    dscale += static_cast<double>(bias) * g;
  }
  if (b.dweight) {
    for (int64_t j = 0; j < b.k; ++j) m[j] *= inner;
    narrow(m, b.k, 1, b.k, b.dweight, i);
  }
  const C scaled = inner * g;
  if (b.dbias) narrow(&scaled, 1, 1, 1, {b.dbias.data, b.dbias.dtype, 1}, i);
  return b.alpha * dscale;
}

template <typename C, typename S>
void backward(const ChannelAdapterBackward& b) {
  constexpr int64_t kCols = kTileCols<C>;
  Transform<C> t(b.d, b.k, b.channels, sizeof(S));
  const bool products = b.dweight || (b.dscale && !b.scale_input), sums = b.dweight || b.dscale || b.dbias;
  const int64_t kp = round_up(b.k, kCols), scratch_size = Tiles<C>::kCount * t.tile_size();
  const int64_t partial_size = (products ? b.k * kp : 0) + kp;
  int threads = threads_for(b.threads, b.n, b.dx ? b.d : b.k, 2 * b.k * b.k);
  using W = Workspace;
  Workspace work(W::bytes<C>(kp * b.k) + 2 * W::bytes<C>(kp) + W::bytes<double>(b.k) + W::bytes<double>(threads) +
                 W::bytes<C>(threads * scratch_size) + W::bytes<C>(threads * partial_size));
  C* panels = work.take<C>(kp * b.k);
  C* scales = work.take<C>(kp);
  C* weight_row = work.take<C>(kp);
  double* dscale = work.take<double>(b.k);
  double* traces = work.take<double>(threads);
  C* scratch = work.take<C>(threads * scratch_size);
  C* partials = work.take<C>(threads * partial_size);

  if (b.dx) advise_huge_pages(b.dx.data, b.n * b.dx.stride * static_cast<int64_t>(sizeof(S)));
  const C s = scale_of<C>(b.scale, b.alpha);
  t.panels = panels, t.carry = b.scale_input ? s : C(1);
  for (int64_t j = 0; j < kp; ++j) scales[j] = b.scale_input ? C(1) : s;
  for (int i = 0; i < threads; ++i) traces[i] = 0;

#pragma omp parallel num_threads(threads)
  {
#pragma omp single nowait
    threads = omp_get_num_threads();  // the team may be smaller than asked for
    if (b.dx) {
#pragma omp for nowait
      for (int64_t p = 0; p < kp; p += kCols) pack_rows<C>(b.weight, p, b.k, b.k, scales, panels + p * b.k);
    }
#pragma omp barrier
    const int me = omp_get_thread_num();
    const Tiles<C> tiles(scratch + me * scratch_size, t.tile_size());
    C* mine = partials + me * partial_size;
    const Range range = share(b.n, me, threads);
    if (range.begin == range.end) std::memset(mine, 0, sizeof(C) * partial_size);
    for (int64_t row = range.begin; row < range.end; row += t.block) {
      const int64_t rows = range.end - row < t.block ? range.end - row : t.block;
      const S* g = static_cast<const S*>(b.g.data) + row * b.g.stride;
      const Operand<C> in = chosen(t, g, b.g.stride, rows, static_cast<S*>(nullptr), tiles);
      const Partial<C> partial{mine, mine + partial_size - kp, traces + me};
      if (sums) accumulate(b, row, rows, row == range.begin, in, kp, products, partial, tiles);
      if (b.dx) transform(t, g, b.g.stride, rows, in, tiles, static_cast<S*>(b.dx.data) + row * b.dx.stride, b.dx.stride);
    }
  }
  for (int64_t i = 0; sums && i < b.k; ++i) {
    C *m = partials + i * kp, *g = partials + partial_size - kp + i;  // summed in place, into the first partial
    if (products) sum_partials(m, partial_size, threads, b.k, m);
    sum_partials(g, partial_size, threads, 1, g);
    dscale[i] = finish_row(b, i, s, m, *g, weight_row);
  }
  C total = 0;
  if (b.dscale) {
    double sum = 0;
    for (int64_t i = 0; i < b.k; ++i) sum += dscale[i];
    for (int i = 0; b.scale_input && i < threads; ++i) sum += b.alpha * traces[i];
    total = static_cast<C>(sum);
    narrow(&total, 1, 1, 1, b.dscale, 0);
  }
}

}  // namespace

void channel_adapter_forward(const ChannelAdapterForward& f) {
  if (f.x.dtype == DType::kFloat64) return forward<double, double>(f);
  with_storage<float>(f.x.dtype, [&](auto* x) { forward<float, std::remove_pointer_t<decltype(x)>>(f); });
}

void channel_adapter_backward(const ChannelAdapterBackward& b) {
  if (b.g.dtype == DType::kFloat64) return backward<double, double>(b);
  with_storage<float>(b.g.dtype, [&](auto* g) { backward<float, std::remove_pointer_t<decltype(g)>>(b); });
}

}  // namespace petl::PETL_ISA
