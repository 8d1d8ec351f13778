// AdamW and SGD on chosen channels, in every instruction set this processor has, against plain loops in double. Buffers
// have the exact size, so that the sanitizers see an access past the end, and everything that was not chosen holds NaN
// in the gradient and must not change by a bit.
#include "testing.h"

namespace {

// One matrix with its gradient and states, in float or double, and the same in double for the plain loop.
template <typename T>
struct Matrix {
  int64_t rows, cols, gap;
  Selection selection;
  std::vector<int64_t> channels;
  std::vector<T> param, grad, state_0, state_1;
  float step = 0;

  int64_t chosen_rows() const { return selection == Selection::kRows ? static_cast<int64_t>(channels.size()) : rows; }
  int64_t chosen_cols() const { return selection == Selection::kColumns ? static_cast<int64_t>(channels.size()) : cols; }
  size_t at(int64_t i, int64_t j) const {  // of element (i, j) of what was chosen, in the matrix
    const int64_t row = selection == Selection::kRows ? channels[static_cast<size_t>(i)] : i;
    const int64_t col = selection == Selection::kColumns ? channels[static_cast<size_t>(j)] : j;
    return static_cast<size_t>(row * (cols + gap) + col);
  }
  ChannelTensor tensor() {
    return {param.data(), grad.data(), {state_0.data(), state_1.data()}, &step, channels.data(),
            sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32, selection, chosen_rows(), chosen_cols(), cols + gap, 1,
            cols + gap, 1};
  }
};

template <typename T>
Matrix<T> make(std::mt19937& rng, int64_t rows, int64_t cols, int64_t gap, Selection selection,
               std::vector<int64_t> channels) {
  std::normal_distribution<double> normal;
  Matrix<T> m{rows, cols, gap, selection, channels, {}, {}, {}, {}};
  m.param.resize(rows ? static_cast<size_t>((rows - 1) * (cols + gap) + cols) : 0);
  for (T& p : m.param) p = static_cast<T>(normal(rng));
  m.grad.assign(m.param.size(), static_cast<T>(NAN));
  for (int64_t i = 0; i < m.chosen_rows(); ++i) {
    for (int64_t j = 0; j < m.chosen_cols(); ++j) m.grad[m.at(i, j)] = static_cast<T>(normal(rng));
  }
  m.state_0.resize(static_cast<size_t>(m.chosen_rows() * m.chosen_cols()));
  m.state_1.resize(m.state_0.size());
  return m;
}

// Runs three steps of `kernel` and of `plain(p, g, s0, s1, step)`, which updates one element, and compares.
template <typename T, typename Options, typename Plain>
void run(const std::string& name, void (*kernel)(const ChannelStep<Options>&), std::vector<Matrix<T>> matrices,
         const Options& options, int states, int threads, float scale, Plain plain) {
  std::vector<Matrix<T>> before = matrices;
  std::vector<std::vector<double>> params, first, second;
  for (Matrix<T>& m : matrices) {
    params.emplace_back(m.param.begin(), m.param.end());
    first.emplace_back(m.state_0.size()), second.emplace_back(m.state_1.size());
  }
  const std::vector<Options> all(matrices.size(), options);
  const float infinite = 1, finite = 0;
  for (int step = 0; step < 4; ++step) {
    std::vector<ChannelTensor> tensors;
    for (Matrix<T>& m : matrices) {
      tensors.push_back(m.tensor());
      if (states < 2) tensors.back().states[1] = nullptr;
      if (states < 1) tensors.back().states[0] = nullptr;
    }
    const float* inf = step == 1 ? &infinite : &finite;  // of the second nothing may remain
    kernel({tensors.data(), all.data(), static_cast<int64_t>(tensors.size()), &scale, inf, threads});
    for (size_t k = 0; k < matrices.size() && step != 1; ++k) {
      Matrix<T>& m = matrices[k];
      for (int64_t i = 0, e = 0; i < m.chosen_rows(); ++i) {
        for (int64_t j = 0; j < m.chosen_cols(); ++j, ++e) {
          const size_t at = m.at(i, j), s = static_cast<size_t>(e);
          plain(params[k][at], static_cast<double>(m.grad[at]) / scale, first[k][s], second[k][s], m.step);
        }
      }
    }
  }
  const double tolerance = sizeof(T) == 8 ? 1e-14 : 2e-6;
  for (size_t k = 0; k < matrices.size(); ++k) {
    const std::string what = name + ", matrix " + std::to_string(k);
    const Matrix<T>& m = matrices[k];
    std::vector<bool> chosen(m.param.size());
    bool close = true, same = true, moved = m.state_0.empty();
    for (int64_t i = 0, e = 0; i < m.chosen_rows(); ++i) {
      for (int64_t j = 0; j < m.chosen_cols(); ++j, ++e) {
        const size_t at = m.at(i, j), s = static_cast<size_t>(e);
        chosen[at] = true;
        close &= std::abs(static_cast<double>(m.param[at]) - params[k][at]) <= tolerance * 8;
        close &= states < 1 || std::abs(static_cast<double>(m.state_0[s]) - first[k][s]) <= tolerance * 8;
        close &= states < 2 || std::abs(static_cast<double>(m.state_1[s]) - second[k][s]) <= tolerance * 8;
        moved |= std::abs(static_cast<double>(m.param[at] - before[k].param[at])) > 1e-3;
      }
    }
    for (size_t at = 0; at < chosen.size(); ++at) {
      same &= chosen[at] || std::memcmp(&m.param[at], &before[k].param[at], sizeof(T)) == 0;
    }
    expect(close, what + ": wrong values");
    expect(moved, what + ": nothing was updated");
    expect(same, what + ": something that was not chosen changed");
    expect(m.step == 3, what + ": wrong count of steps");
  }
}

template <typename T>
std::vector<Matrix<T>> matrices() {
  std::mt19937 rng(5);
  const auto all = Selection::kAll, rows = Selection::kRows, cols = Selection::kColumns;
  return {make<T>(rng, 1, 1, 0, all, {}),          make<T>(rng, 1, 1000, 0, all, {}),
          make<T>(rng, 9, 37, 3, all, {}),         make<T>(rng, 9, 37, 3, rows, {7, 0, 8, 3}),
          make<T>(rng, 9, 37, 0, rows, {}),        make<T>(rng, 12, 3, 0, rows, {11, 4}),
          make<T>(rng, 9, 37, 5, cols, {36, 0, 5}), make<T>(rng, 1, 60, 0, cols, {59, 1, 30}),
          make<T>(rng, 600, 70, 1, cols, {69, 0, 1, 2, 33, 3, 40}), make<T>(rng, 300, 257, 0, rows, {299, 4, 5, 6, 200, 0}),
          make<T>(rng, 0, 5, 0, all, {}),          make<T>(rng, 200, 256, 0, all, {})};
}

template <typename T>
void run_all(const std::string& isa) {
  for (int threads : {1, 2, 3}) {
    for (double beta1 : {0.9, 0.3}) {  // torch.lerp has two branches
      const AdamWOptions o{0.1, beta1, 0.99, 1e-8, 0.2, beta1 == 0.3};
      const auto plain = [&](double& p, double g, double& m, double& v, float step) {
        if (o.maximize) g = -g;
        m = o.beta1 * m + (1 - o.beta1) * g, v = o.beta2 * v + (1 - o.beta2) * g * g;
        const double m_hat = m / (1 - std::pow(o.beta1, step)), v_hat = v / (1 - std::pow(o.beta2, step));
        p = p - o.lr * o.weight_decay * p - o.lr * m_hat / (std::sqrt(v_hat) + o.eps);
      };
      run<T>(isa + " adamw", kernels().channel_adamw, matrices<T>(), o, 2, threads, 3.0f, plain);
    }
    const SGDOptions options[] = {{0.1, 0, 0, 0, false, false},
                                  {0.1, 0, 0, 0.3, false, true},
                                  {0.1, 0.9, 0.4, 0.3, false, false},
                                  {0.1, 0.9, 0, 0.3, true, true}};
    for (const SGDOptions& o : options) {
      const auto plain = [&](double& p, double g, double& buffer, double&, float step) {
        g = (o.maximize ? -g : g) + o.weight_decay * p;
        buffer = step == 1 ? g : o.momentum * buffer + (1 - o.dampening) * g;
        p -= o.lr * (o.momentum == 0 ? g : o.nesterov ? g + o.momentum * buffer : buffer);
      };
      run<T>(isa + " sgd", kernels().channel_sgd, matrices<T>(), o, o.momentum != 0, threads, 3.0f, plain);
    }
  }
}

}  // namespace

int main() {
  return in_every_isa([&](const std::string& isa) {
    run_all<float>(isa);
    run_all<double>(isa);
  });
}
