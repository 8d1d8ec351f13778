// The adapters of many tasks, in every instruction set this processor has, against loops in double. Samples are long and
// short, in any order, so that blocks of rows are taken in place and gathered; threads share tasks.
#include <atomic>
#include <cstdlib>
#include <new>

#include "testing.h"

// Which allocation from now on fails; none where it is negative.
std::atomic<int> failing{-1};

void* operator new(size_t bytes) {
  if (failing >= 0 && failing-- == 0) throw std::bad_alloc();
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

// Lets the call's allocations fail one after the other: each is an exception here, or among the threads the end.
template <typename Call>
int run_out_of_memory(Call call) {
#ifdef __SANITIZE_THREAD__
  constexpr int kFirst = 1 << 20;  // none: the threads of openmp.cpp are allocated too
#else
  constexpr int kFirst = 0;
#endif
  for (int before = kFirst;; ++before) {
    try {
      failing = before;
      call();
      failing = -1;
      return before;
    } catch (const std::bad_alloc&) {
    }
  }
}

struct Sizes {
  int64_t samples, rows, d_in, r, d_out, tasks;
};

struct Parameters {
  Stored w_down, b_down, w_up, b_up;
  Adapter adapter() { return {w_down.rows(), b_down.rows(), w_up.rows(), b_up.rows()}; }
};

double gelu(double z) { return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0))); }
double gelu_slope(double z) {
  return 0.5 * (1 + std::erf(z / std::sqrt(2.0))) + z * std::exp(-0.5 * z * z) / std::sqrt(2 * std::acos(-1.0));
}

void run(const std::string& isa, const Sizes& s, DType dtype, DType weights, int threads, bool all) {
  std::mt19937 rng(11);
  const int64_t n = s.samples * s.rows;
  const double scale = 1.5;
  Stored x(rng, n, s.d_in, dtype, 3), g(rng, n, s.d_out, dtype, 1), residual(rng, n, s.d_out, dtype);
  std::vector<Parameters> own, got;
  std::vector<Adapter> adapters, gradients;
  for (int64_t t = 0; t < s.tasks; ++t) {
    own.push_back({{rng, s.r, s.d_in, weights}, {rng, 1, s.r, weights}, {rng, s.d_out, s.r, weights}, {rng, 1, s.d_out, weights}});
    got.push_back({{s.r, s.d_in, weights}, {1, s.r, weights}, {s.d_out, s.r, weights}, {1, s.d_out, weights}});
  }
  for (int64_t t = 0; t < s.tasks; ++t) {
    adapters.push_back(own[t].adapter());
    gradients.push_back(all || t ? got[t].adapter() : Adapter{});  // the first task may be frozen
  }
  std::vector<int64_t> task;
  for (int64_t i = 0; i < s.samples; ++i) task.push_back(static_cast<int64_t>(rng() % static_cast<unsigned>(s.tasks)));

  Values want_y, want_z, want_dx;
  std::vector<Values> dw_down(own.size(), Values(s.r * s.d_in)), db_down(own.size(), Values(s.r));
  std::vector<Values> dw_up(own.size(), Values(s.d_out * s.r)), db_up(own.size(), Values(s.d_out));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = task[i / s.rows];
    const Parameters& p = own[t];
    Values z(s.r), dz(s.r), dx(s.d_in);
    for (int64_t k = 0; k < s.r; ++k) {
      z[k] = p.b_down(0, k);
      for (int64_t c = 0; c < s.d_in; ++c) z[k] += x(i, c) * p.w_down(k, c);
    }
    for (int64_t c = 0; c < s.d_out; ++c) {
      double u = p.b_up(0, c);
      for (int64_t k = 0; k < s.r; ++k) {
        u += gelu(z[k]) * p.w_up(c, k);
        dz[k] += scale * g(i, c) * p.w_up(c, k);
        dw_up[t][c * s.r + k] += scale * g(i, c) * gelu(z[k]);
      }
      db_up[t][c] += scale * g(i, c);
      want_y.push_back(residual(i, c) + scale * u);
    }
    for (int64_t k = 0; k < s.r; ++k) {
      dz[k] *= gelu_slope(z[k]);
      db_down[t][k] += dz[k];
      for (int64_t c = 0; c < s.d_in; ++c) {
        dw_down[t][k * s.d_in + c] += dz[k] * x(i, c);
        dx[c] += dz[k] * p.w_down(k, c);
      }
    }
    want_z.insert(want_z.end(), z.begin(), z.end());
    want_dx.insert(want_dx.end(), dx.begin(), dx.end());
  }

  Stored y(n, s.d_out, dtype), z(n, s.r, dtype), dx(n, s.d_in, dtype);
  const AdapterBankForward forward{s.samples, s.rows, s.d_in, s.r, s.d_out, s.tasks, task.data(), adapters.data(), x.rows(),
                                   residual.rows(), scale, Activation::kGelu, y.rows(), z.rows(), threads};
  const AdapterBankBackward backward{s.samples, s.rows, s.d_in, s.r, s.d_out, s.tasks, task.data(), adapters.data(),
                                     gradients.data(), g.rows(), x.rows(), z.rows(), scale, Activation::kGelu, false,
                                     dx.rows(), threads};
  const int failed = run_out_of_memory([&] { kernels().adapter_bank_forward(forward); }) +
                     run_out_of_memory([&] { kernels().adapter_bank_backward(backward); });
  expect(failed > 6, text("only ", failed, " allocations have failed"));
  const double tolerated = tolerance(dtype);
  const std::string name = text(isa, " ", s.samples, " x ", s.rows, " d=", s.d_in, "/", s.d_out, " r=", s.r, " tasks ",
                                s.tasks, " ", dtype_name(dtype), " threads ", threads, " ");
  compare(name + "y", y, want_y, tolerated);
  compare(name + "z", z, want_z, tolerated);
  compare(name + "dx", dx, want_dx, tolerated);
  for (size_t t = all ? 0 : 1; t < own.size(); ++t) {
    compare(name + "dw_down", got[t].w_down, dw_down[t], tolerated);
    compare(name + "db_down", got[t].b_down, db_down[t], tolerated);
    compare(name + "dw_up", got[t].w_up, dw_up[t], tolerated);
    compare(name + "db_up", got[t].b_up, db_up[t], tolerated);
  }
}

}  // namespace

int main() {
  const Sizes sizes[] = {{1, 1, 1, 1, 1, 1},     {9, 1, 33, 3, 17, 4},   {7, 5, 16, 8, 16, 12},
                         {6, 130, 24, 20, 40, 2}, {23, 13, 31, 35, 31, 3}, {3, 200, 64, 5, 64, 1}};
  return in_every_isa([&](const std::string& isa) {
    for (const Sizes& s : sizes) {
      for (int threads : {1, 3}) {
        run(isa, s, DType::kFloat64, DType::kFloat64, threads, true);
        run(isa, s, DType::kFloat32, DType::kFloat32, threads, false);
        run(isa, s, DType::kBFloat16, DType::kFloat32, threads, true);
        run(isa, s, DType::kBFloat16, DType::kBFloat16, threads, false);
      }
    }
  });
}
