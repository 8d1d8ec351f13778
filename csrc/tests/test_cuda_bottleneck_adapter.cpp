// The CUDA kernels of the bottleneck adapter, their sources run on the emulator, against plain loops in double.
#define PETL_EMULATE
#include "activation.h"

#include "../cuda/adapter_sm90.cu"
#include "../cuda/bottleneck_adapter.cu"

namespace {

using petl::cuda::Launch;
using petl::cuda::emulator::machine;

// out [n, m] = a [n, k] b [k, m], of matrices given as functions.
template <typename A, typename B>
Values product(int64_t n, int64_t k, int64_t m, A a, B b) {
  Values out(static_cast<size_t>(n * m));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t l = 0; l < k; ++l) out[static_cast<size_t>(i * m + j)] += a(i, l) * b(l, j);
    }
  }
  return out;
}

struct Sizes {
  int64_t n, d_in, r, d_out, gap;
};
struct Options {
  DType dtype = DType::kFloat32, weights = DType::kFloat32;
  Activation activation = Activation::kGelu;
  int64_t scale_size = 0;
  bool sequential = true, fast = false, sm90 = false;
  int processors = 2;
  int64_t shared_bytes = 99 * 1024;  // what sm_86 and sm_120 have; the least of all
  std::string only;                  // one gradient, or all
};

Options options(DType dtype, DType weights, Activation activation = Activation::kGelu, int64_t scale_size = 0) {
  Options o;
  o.dtype = dtype, o.weights = weights, o.activation = activation, o.scale_size = scale_size;
  return o;
}

// Returns the bits of the weights' gradients.
std::vector<unsigned char> run(const Sizes& s, const Options& o) {
  std::mt19937 rng(static_cast<unsigned>(s.n * 31 + s.d_in * 7 + s.r));
  Stored x(rng, s.n, s.d_in, o.dtype, s.gap), w_down(rng, s.r, s.d_in, o.weights), b_down(rng, 1, s.r, o.weights);
  Stored w_up(rng, s.d_out, s.r, o.weights), b_up(rng, 1, s.d_out, o.weights), other(rng, s.n, s.d_out, o.dtype, s.gap);
  const int64_t scales = std::max<int64_t>(o.scale_size, 1);
  Stored scale(rng, 1, scales, o.weights), g(rng, s.n, s.d_out, o.dtype, s.gap);
  Stored& residual = o.sequential ? x : other;
  // Weights of the size that training begins with, so that activations are neither flat nor the identity.
  const double alpha = 0.25;
  const auto scaled = [&](int64_t c) { return alpha * (o.scale_size ? scale(0, o.scale_size == 1 ? 0 : c) : 1.0); };
  const auto at = [](const Values& v, int64_t cols) {
    return [&v, cols](int64_t i, int64_t j) { return v[static_cast<size_t>(i * cols + j)]; };
  };

  Values z = product(s.n, s.d_in, s.r, x, [&](int64_t c, int64_t k) { return w_down(k, c); });
  for (size_t e = 0; e < z.size(); ++e) z[e] += b_down(0, static_cast<int64_t>(e) % s.r);
  Values h(z);
  for (double& v : h) v = act(o.activation, v);
  Values u = product(s.n, s.r, s.d_out, at(h, s.r), [&](int64_t k, int64_t c) { return w_up(c, k); }), y(u);
  Values db_up(static_cast<size_t>(s.d_out)), db_down(static_cast<size_t>(s.r)), dscale(static_cast<size_t>(scales));
  for (int64_t i = 0; i < s.n; ++i) {
    for (int64_t c = 0; c < s.d_out; ++c) {
      const auto e = static_cast<size_t>(i * s.d_out + c);
      u[e] += b_up(0, c);
      y[e] = residual(i, c) + scaled(c) * u[e];
      db_up[static_cast<size_t>(c)] += scaled(c) * g(i, c);
      dscale[static_cast<size_t>(o.scale_size > 1 ? c : 0)] += alpha * g(i, c) * u[e];
    }
  }
  const auto scaled_g = [&](int64_t i, int64_t c) { return scaled(c) * g(i, c); };
  Values dz = product(s.n, s.d_out, s.r, scaled_g, w_up);
  for (size_t e = 0; e < dz.size(); ++e) {
    dz[e] *= slope(o.activation, z[e]);
    db_down[e % static_cast<size_t>(s.r)] += dz[e];
  }
  Values dx = product(s.n, s.r, s.d_in, at(dz, s.r), w_down);
  for (size_t e = 0; o.sequential && e < dx.size(); ++e) {
    dx[e] += g(static_cast<int64_t>(e) / s.d_in, static_cast<int64_t>(e) % s.d_in);
  }
  const Values dw_down = product(s.r, s.n, s.d_in, [&](int64_t k, int64_t i) { return at(dz, s.r)(i, k); }, x);
  const Values dw_up = product(s.d_out, s.n, s.r, [&](int64_t c, int64_t i) { return scaled_g(i, c); }, at(h, s.r));

  Stored got_y(s.n, s.d_out, o.dtype), got_z(s.n, s.r, o.dtype), got_dx(s.n, s.d_in, o.dtype);
  Stored got_dw_down(s.r, s.d_in, o.weights), got_db_down(1, s.r, o.weights), got_dw_up(s.d_out, s.r, o.weights);
  Stored got_db_up(1, s.d_out, o.weights), got_dscale(1, scales, o.weights);
  const Rows scale_rows = o.scale_size ? scale.rows() : Rows{};
  const auto wanted = [&](const char* name, Stored& m) { return o.only.empty() || o.only == name ? m.rows() : Rows{}; };
  const Launch launch{0, nullptr, o.processors, o.shared_bytes, o.fast};
  machine.counters = {};
  const auto forward = o.sm90 ? petl::cuda::bottleneck_forward_sm90 : petl::cuda::bottleneck_forward;
  forward({s.n, s.d_in, s.r, s.d_out, x.rows(), w_down.rows(), b_down.rows(), w_up.rows(),
           b_up.rows(), residual.rows(), scale_rows, Rows{}, o.scale_size, {}, alpha,
           o.activation, got_y.rows(), got_z.rows(), 0},
          launch);
  const int64_t forward_launches = machine.counters.launches;
  const BottleneckBackward back{s.n, s.d_in, s.r, s.d_out, g.rows(), x.rows(), got_z.rows(), w_down.rows(), w_up.rows(),
                                b_up.rows(), scale_rows, Rows{}, o.scale_size, {}, alpha, o.activation, o.sequential,
                                wanted("dx", got_dx), wanted("dw_down", got_dw_down), wanted("db_down", got_db_down),
                                wanted("dw_up", got_dw_up), wanted("db_up", got_db_up),
                                o.scale_size ? wanted("dscale", got_dscale) : Rows{}, Rows{}, 0};
  const auto needed = o.sm90 ? petl::cuda::bottleneck_workspace_sm90 : petl::cuda::bottleneck_workspace;
  std::vector<unsigned char> workspace(static_cast<size_t>(needed(back, launch)), 0xff);
  (o.sm90 ? petl::cuda::bottleneck_backward_sm90 : petl::cuda::bottleneck_backward)(back, launch, workspace.data());

  const double tolerated = o.fast ? 2e-3 : tolerance(o.dtype);
  const std::string name = text("n=", s.n, " d=", s.d_in, "/", s.d_out, " r=", s.r, " ", dtype_name(o.dtype), " act ",
                                static_cast<int>(o.activation), " scale ", o.scale_size, " ", o.only, " ");
  const auto compare_if = [&](const char* what, const Stored& got, const Values& want, double of = 1) {
    if (o.only.empty() || o.only == what) compare(name + what, got, want, tolerated * of);
  };
  compare(name + "y", got_y, y, tolerated);
  compare(name + "z", got_z, z, tolerated);
  compare_if("dx", got_dx, dx);
  compare_if("dw_down", got_dw_down, dw_down);
  compare_if("db_down", got_db_down, db_down);
  compare_if("dw_up", got_dw_up, dw_up);
  compare_if("db_up", got_db_up, db_up);
  // That of a scalar is what remains of thousands of products, each of factors that were rounded, of either sign.
  if (o.scale_size) compare_if("dscale", got_dscale, dscale, o.scale_size == 1 ? 4 : 1);
  expect(forward_launches == 1 && machine.counters.launches <= (o.sm90 ? 2 : 4), name + "launches");
  expect(machine.counters.collisions == 0, text(name, "bank conflicts: ", machine.counters.collisions));
  std::vector<unsigned char> bits(got_dw_down.bytes);
  bits.insert(bits.end(), got_dw_up.bytes.begin(), got_dw_up.bytes.end());
  return bits;
}

// wgmma and TMA, to which rows must be on 16 bytes.
void on_sm90(DType brain, DType half) {
  const auto hopper = [](DType dtype, DType weights, Activation activation, int64_t scale_size, int processors) {
    Options o = options(dtype, weights, activation, scale_size);
    o.sm90 = true, o.shared_bytes = 227 * 1024, o.processors = processors;
    return o;
  };
  // One cluster with more tiles than its ring has places; five and three, whose tree is lopsided; other residuals.
  run({1, 8, 8, 8, 0}, hopper(half, half, Activation::kGelu, 0, 132));
  run({270, 136, 64, 136, 0}, hopper(brain, brain, Activation::kGelu, 1, 2));
  const Options same = hopper(half, half, Activation::kTanh, 200, 10);
  const auto bits = run({270, 200, 24, 200, 8}, same);
  machine.last_first = true;  // other clusters are the later ones: not a bit changes
  expect(run({270, 200, 24, 200, 8}, same) == bits, "the order of clusters shows");
  machine.last_first = false;
  for (const bool wide : {false, true}) {
    Options other = hopper(brain, brain, Activation::kSilu, wide ? 328 : 1, 132);
    other.sequential = false;
    run(wide ? Sizes{130, 72, 16, 328, 8} : Sizes{130, 264, 40, 72, 0}, other);
  }
  Options small = hopper(brain, brain, Activation::kGelu, 0, 132);
  small.shared_bytes = 48 * 1024;  // two stages
  run({66, 136, 32, 136, 0}, small);
  for (const char* only : {"dx", "dw_down", "db_down", "dw_up", "db_up", "dscale", "nothing"}) {
    Options some = hopper(half, half, Activation::kGelu, only[2] == 'c' ? 72 : 1, 132);
    some.only = only;
    run({130, 72, 8, 72, 0}, some);
  }
}

}  // namespace

int main() {
  constexpr DType kSingle = DType::kFloat32, kBrain = DType::kBFloat16, kHalf = DType::kFloat16;
  // Nothing divides anything; rows on 16 bytes (of 200 and 136 elements) and not; blocks of 64 rows and of 32.
  const Sizes sizes[] = {{1, 1, 1, 1, 0}, {33, 64, 16, 64, 0}, {70, 200, 24, 200, 8}, {130, 97, 33, 97, 0}};
  for (const Sizes& s : sizes) {
    for (const DType dtype : {kSingle, kBrain, kHalf}) run(s, options(dtype, dtype));
  }
  for (const DType weights : {kSingle, kHalf}) {  // converted as they are loaded
    Options mixed = options(kBrain, weights, Activation::kSilu, 1);
    mixed.sequential = false;
    run({45, 72, 20, 56, 1}, mixed);
  }
  for (int a = 0; a <= static_cast<int>(Activation::kIdentity); ++a) {
    run({35, 40, 12, 40, 0}, options(kSingle, kSingle, static_cast<Activation>(a), a % 2 ? 1 : 40));
  }
  Options fast = options(kSingle, kSingle);
  fast.fast = true;
  run({35, 72, 40, 72, 0}, fast);
  for (const DType dtype : {kSingle, kBrain}) {  // wide bottlenecks; rows that stay and that do not fit
    run({70, 136, 224, 136, 0}, options(dtype, dtype, Activation::kGelu, 136));
    Options large = options(dtype, dtype);
    large.shared_bytes = 227 * 1024;
    run({129, 776, 65, 776, 0}, large);
    large.shared_bytes = 48 * 1024;
    run({65, 776, 8, 776, 0}, large);
  }
  for (const char* only : {"dx", "dw_down", "db_down", "dw_up", "db_up", "dscale", "nothing"}) {
    for (const int64_t scale_size : {1, 72}) {
      Options some = options(kBrain, kSingle, Activation::kTanh, scale_size);
      some.only = only;
      run({37, 72, 12, 72, 0}, some);
    }
  }
  on_sm90(kBrain, kHalf);
  return finish();
}
