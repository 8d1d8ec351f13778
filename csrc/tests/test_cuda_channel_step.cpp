// The optimizers' CUDA kernel, its source run on the emulator, over a table of matrices, against plain loops in double.
// Gradients are NaN outside what was chosen, and there nothing may change by a bit.
#define PETL_EMULATE
#include "testing.h"

#include "../cuda/channel_step.cu"

namespace {

struct Matrix {
  Stored param, grad, state_0, state_1;
  Selection selection;
  std::vector<int64_t> channels;
  Values plain, first, second;  // in double: all of the parameter, and the states
  int64_t rows() const { return selection == Selection::kRows ? static_cast<int64_t>(channels.size()) : param.n; }
  int64_t cols() const { return selection == Selection::kColumns ? static_cast<int64_t>(channels.size()) : param.cols; }
};

Matrix make(std::mt19937& rng, int64_t n, int64_t cols, DType dtype, Selection selection, int64_t k) {
  const std::vector<int64_t> channels = choose(rng, k, selection == Selection::kRows ? n : cols);
  Matrix m{Stored(rng, n, cols, dtype, 3), Stored(rng, n, cols, dtype), Stored(1, 1, dtype), Stored(1, 1, dtype),
           selection, channels, {}, {}, {}};
  m.state_0 = m.state_1 = Stored(m.rows(), m.cols(), dtype);
  m.plain.resize(static_cast<size_t>(n * cols));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < cols; ++j) m.plain[static_cast<size_t>(i * cols + j)] = m.param(i, j);
  }
  m.first.resize(static_cast<size_t>(m.rows() * m.cols())), m.second = m.first;
  for (int64_t i = 0; i < m.rows(); ++i) {
    for (int64_t j = 0; j < m.cols(); ++j) m.state_0.put(i, j, 0), m.state_1.put(i, j, 0);
  }
  Stored grad(n, cols, dtype);  // NaN but where chosen
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t index = selection == Selection::kRows ? i : j;
      const bool chosen = selection == Selection::kAll || std::count(channels.begin(), channels.end(), index);
      if (chosen) grad.put(i, j, m.grad(i, j));
    }
  }
  m.grad = grad;
  return m;
}

// Three steps and, between them, one that `found_inf` calls off.
template <typename Plain>
void run(const std::string& name, void (*kernel)(const petl::cuda::DeviceStep&, const petl::cuda::Launch&),
         const double (&options)[6], bool states, Plain plain) {
  std::mt19937 rng(5);
  std::vector<Matrix> all;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    all.push_back(make(rng, 1, 1, dtype, Selection::kAll, 0));
    all.push_back(make(rng, 9, 37, dtype, Selection::kRows, 4));
    all.push_back(make(rng, 70, 300, dtype, Selection::kColumns, 33));
    all.push_back(make(rng, 4, 700, dtype, Selection::kAll, 0));
    all.push_back(make(rng, 4, 7, dtype, Selection::kRows, 0));
  }
  const std::vector<Matrix> before = all;
  std::vector<int64_t> table, programs;
  std::vector<double> numbers;
  float step = 0;
  const auto address = [](const void* p) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)); };
  for (Matrix& m : all) {
    const int64_t blocks = (m.rows() * m.cols() + 1023) / 1024, first = static_cast<int64_t>(programs.size()) / 2;
    for (int64_t b = 0; b < blocks; ++b) programs.insert(programs.end(), {&m - all.data(), first});
    table.insert(table.end(), {address(m.param.bytes.data()), address(m.grad.bytes.data()),
                               states ? address(m.state_0.bytes.data()) : 0, states ? address(m.state_1.bytes.data()) : 0,
                               address(&step), address(m.channels.data()), static_cast<int64_t>(m.param.dtype),
                               static_cast<int64_t>(m.selection), m.rows(), m.cols(), m.param.stride, 1, m.grad.stride, 1});
    numbers.insert(numbers.end(), options, options + 6);
  }
  const float scale = 2, infinite = 1, finite = 0;
  for (const bool called_off : {false, true, false, false}) {
    if (!called_off) step += 1;
    kernel({table.data(), numbers.data(), programs.data(), static_cast<int64_t>(programs.size() / 2), &scale,
            called_off ? &infinite : &finite},
           {0, nullptr, 3, 99 * 1024, false});
    if (called_off) continue;
    for (Matrix& m : all) {
      for (int64_t i = 0; i < m.rows(); ++i) {
        for (int64_t j = 0; j < m.cols(); ++j) {
          const int64_t row = m.selection == Selection::kRows ? m.channels[static_cast<size_t>(i)] : i;
          const int64_t col = m.selection == Selection::kColumns ? m.channels[static_cast<size_t>(j)] : j;
          const auto s = static_cast<size_t>(i * m.cols() + j);
          plain(m.plain[static_cast<size_t>(row * m.param.cols + col)], m.grad(row, col) / scale, m.first[s], m.second[s], step);
        }
      }
    }
  }
  for (size_t k = 0; k < all.size(); ++k) {
    const Matrix& m = all[k];
    const std::string what = text(name, ", matrix ", k, " ", dtype_name(m.param.dtype));
    compare(what, m.param, m.plain, tolerance(m.param.dtype));
    int64_t moved = 0;
    for (int64_t i = 0; i < m.param.n; ++i) {
      for (int64_t j = 0; j < m.param.cols; ++j) {
        moved += std::memcmp(m.param.at(i, j), before[k].param.at(i, j), m.param.element()) != 0;
        const bool chosen = !std::isnan(m.grad(i, j));
        expect(chosen || std::memcmp(m.param.at(i, j), before[k].param.at(i, j), m.param.element()) == 0,
               what + ": something that was not chosen changed");
      }
    }
    expect(moved * 10 >= m.rows() * m.cols() * 9, what + ": not all that was chosen changed");
  }
}

}  // namespace

int main() {
  for (const double beta1 : {0.9, 0.3}) {  // torch.lerp has two branches
    const double lr = 0.3, beta2 = 0.95, eps = 1e-2, decay = 0.1;
    const bool maximize = beta1 == 0.3;
    run("adamw", petl::cuda::channel_adamw, {lr, beta1, beta2, eps, decay, maximize ? 1.0 : 0.0}, true,
        [&](double& p, double g, double& m, double& v, float step) {
          if (maximize) g = -g;
          m = beta1 * m + (1 - beta1) * g, v = beta2 * v + (1 - beta2) * g * g;
          const double m_hat = m / (1 - std::pow(beta1, step)), v_hat = v / (1 - std::pow(beta2, step));
          p = p - lr * decay * p - lr * m_hat / (std::sqrt(v_hat) + eps);
        });
  }
  for (const bool nesterov : {false, true}) {
    for (const double momentum : {0.0, 0.9}) {
      const double lr = 0.3, dampening = nesterov ? 0 : 0.4, decay = 0.2;
      run("sgd", petl::cuda::channel_sgd, {lr, momentum, dampening, decay, nesterov ? 1.0 : 0.0, 0}, momentum != 0,
          [&](double& p, double g, double& buffer, double&, float step) {
            g += decay * p;
            buffer = step == 1 ? g : momentum * buffer + (1 - dampening) * g;
            p -= lr * (momentum == 0 ? g : nesterov ? g + momentum * buffer : buffer);
          });
    }
  }
  return finish();
}
