// The CUDA kernels of adapter_norm and norm_adapter, their sources run on the emulator, judged beside eager's arithmetic.
#define PETL_EMULATE
#include "../cuda/adapter_norm.cu"

#include "adapter_norm.h"

namespace {

using petl::cuda::Launch;
using petl::cuda::emulator::machine;

constexpr int64_t kLeast = 99 * 1024, kLittle = 44 * 1024;  // the least is that of sm_86 and sm_120

struct Machine {
  int processors = 1;
  int64_t shared_bytes = kLeast;
  bool fast = false;
};

class Call {
 public:
  Call(const SiteOptions& o, const Machine& on)
      : o_(o), on_{0, nullptr, on.processors, on.shared_bytes, on.fast},
        in_(o, std::mt19937(static_cast<unsigned>(o.n * 31 + o.d * 7 + o.r))) {
    const int64_t width = o.post ? o.d : o.d_in;
    const auto make = [&](const char* name, int64_t rows, int64_t cols, DType dtype) {
      got_.emplace(name, Stored(rows, cols, dtype));
    };
    make("y", o.n, o.d, o.rows), make("z", o.n, o.r, o.branch), make("normal", o.n, o.d, o.rows);
    make("mean", 1, o.n, DType::kFloat32), make("rstd", 1, o.n, DType::kFloat32), make("dx", o.n, o.d_in, o.branch);
    make("dsum", o.n, o.d, o.rows), make("dw_down", o.r, o.d_in, o.weights), make("db_down", 1, o.r, o.weights);
    make("dw_up", o.d, o.r, o.weights), make("db_up", 1, o.d, o.weights), make("dweight", 1, width, o.weights);
    make("dbias", 1, width, o.weights), make("dscale", 1, std::max<int64_t>(o.scale_size, 1), o.weights);
  }

  void run() {
    machine.counters = {};
    forward();
    expect(machine.counters.launches == 1, o_.name() + "launches of the forward");
    machine.counters.launches = 0;
    backward();
    expect(machine.counters.launches <= 3, o_.name() + "launches of the backward");
    expect(machine.counters.collisions == 0, text(o_.name(), "bank conflicts: ", machine.counters.collisions));
  }

  void judge() {
    const Site exact(o_, in_, true), eager(o_, in_, false);
    for (const auto& [name, got] : got_) {
      const bool mean = name == "mean", floats = name == "rstd" || mean, gradient = name[0] == 'd';
      if (gradient ? !wanted(name) : (mean && (o_.post || o_.rms)) || (name == "normal" && !o_.post)) continue;
      const Values &want = exact.of.at(name), &other = eager.of.at(name), values = got.values();
      double error = 0, allowed = 0, largest = 0;
      for (size_t e = 0; e < want.size(); ++e) {
        const double difference = std::abs(values[e] - want[e]);
        error = std::max(error, std::isnan(difference) ? INFINITY : difference);
        allowed = std::max(allowed, std::abs(other[e] - want[e])), largest = std::max(largest, std::abs(want[e]));
      }
      // What one number errs is a draw; of the scale's it is what remains of n d products.
      const double times = want.size() == 1 ? 8 : 2, size = mean ? std::max(largest, 1.0) : largest;
      const double floor = unit(floats ? got.dtype : o_.branch, size);
      const double tf32 = on_.fast ? 2e-3 * largest : 0;
      expect(error <= times * allowed + floor + tf32,
             text(o_.name(), name, ": error ", error, ", eager's ", allowed, ", largest ", largest));
    }
  }

  std::vector<unsigned char> gradients() const {
    std::vector<unsigned char> bits;
    for (const auto& [name, got] : got_) bits.insert(bits.end(), got.bytes.begin(), got.bytes.end());
    return bits;
  }

 private:
  bool wanted(const std::string& name) const {
    if (name == "dsum" && !o_.post) return false;
    if ((name == "dweight" || name == "dbias") && (!o_.affine || (o_.rms && name == "dbias"))) return false;
    if ((name == "db_down" || name == "db_up") && !o_.biases) return false;
    if (name == "dscale" && !o_.scale_size) return false;
    return o_.only.empty() || text(" ", o_.only, " ").find(text(" ", name, " ")) != std::string::npos;
  }
  Rows want(const char* name) { return wanted(name) ? got_.at(name).rows() : Rows{}; }
  Rows if_(bool there, Stored& m) { return there ? m.rows() : Rows{}; }
  Rows scale() { return if_(o_.scale_size > 0, in_.scale); }
  Norm norm() {
    return {if_(o_.affine, in_.weight), if_(o_.affine && !o_.rms, in_.bias), o_.eps, o_.rms,
            if_(!o_.post && !o_.rms, got_.at("mean")), got_.at("rstd").rows()};
  }
  template <typename C>
  std::vector<unsigned char> workspace(int64_t (*needed)(const C&, const Launch&), const C& call) {
    return std::vector<unsigned char>(static_cast<size_t>(needed(call, on_)), 0xff);
  }

  void forward() {
    Stored& residual = o_.sequential && !o_.post ? in_.x : in_.residual;
    const BottleneckForward f{o_.n, o_.d_in, o_.r, o_.d, in_.x.rows(), in_.w_down.rows(), if_(o_.biases, in_.b_down),
                              in_.w_up.rows(), if_(o_.biases, in_.b_up), if_(o_.residual, residual), scale(), {}, o_.scale_size,
                              {}, o_.alpha, o_.activation, got_.at("y").rows(), got_.at("z").rows(), 0};
    if (o_.post) {
      const AdapterNormForward call{f, (o_.sequential ? in_.x : in_.hidden).rows(), norm(), got_.at("normal").rows()};
      petl::cuda::adapter_norm_forward(call, on_, workspace(petl::cuda::adapter_norm_forward_workspace, call).data());
    } else {
      const NormAdapterForward call{f, norm()};
      petl::cuda::norm_adapter_forward(call, on_, workspace(petl::cuda::norm_adapter_forward_workspace, call).data());
    }
  }
  void backward() {
    const BottleneckBackward b{o_.n, o_.d_in, o_.r, o_.d, in_.g.rows(), in_.x.rows(), got_.at("z").rows(), in_.w_down.rows(),
                               in_.w_up.rows(), if_(o_.biases, in_.b_up), scale(), {}, o_.scale_size, {}, o_.alpha, o_.activation,
                               o_.sequential, want("dx"), want("dw_down"), want("db_down"), want("dw_up"), want("db_up"),
                               want("dscale"), {}, 0};
    if (o_.post) {
      const AdapterNormBackward call{b, norm(), got_.at("normal").rows(), want("dsum"), want("dweight"), want("dbias")};
      petl::cuda::adapter_norm_backward(call, on_, workspace(petl::cuda::adapter_norm_workspace, call).data());
    } else {
      const NormAdapterBackward call{b, norm(), want("dweight"), want("dbias")};
      petl::cuda::norm_adapter_backward(call, on_, workspace(petl::cuda::norm_adapter_workspace, call).data());
    }
  }

  const SiteOptions o_;
  const Launch on_;
  SiteInputs in_;
  std::map<std::string, Stored> got_;
};

std::vector<unsigned char> run(const SiteOptions& o, const Machine& on = {}) {
  Call call(o, on);
  call.run();
  call.judge();
  return call.gradients();
}

SiteOptions site(bool post, int64_t n, int64_t d, int64_t r, DType dtype) {
  SiteOptions o{n, d, r, d};
  o.post = post, o.branch = o.rows = o.weights = dtype;
  return o;
}

}  // namespace

int main() {
  constexpr DType kSingle = DType::kFloat32, kBrain = DType::kBFloat16, kHalf = DType::kFloat16;
  for (const bool post : {true, false}) {
    // Nothing divides anything; rows on 16 bytes and not; blocks of 32 rows and of 64, of which the last is not full.
    for (const DType dtype : {kSingle, kBrain, kHalf}) {
      run(site(post, 1, 1, 1, dtype)), run(site(post, 33, 200, 16, dtype), {2});
      SiteOptions o = site(post, 70, 97, 33, dtype);
      o.gap = 3, o.rms = dtype != kHalf, o.scale_size = dtype == kBrain ? 1 : 97, o.activation = Activation::kSilu;
      run(o);
    }
    SiteOptions other = site(post, 45, 72, 20, kBrain);  // other terms, sizes and dtypes
    other.sequential = false, other.d = 136, other.weights = kSingle, other.scale_size = 1, other.eps = 0.5, other.gap = 8;
    run(other);
    other.residual = other.affine = other.biases = false, other.rms = true, other.activation = Activation::kRelu;
    run(other);
    for (const DType dtype : {kSingle, kHalf}) {
      SiteOptions far = site(post, 37, 136, 8, dtype);  // rows far from zero, as good as eager's
      far.offset = dtype == kSingle ? 1e4 : 100;
      run(far);
      far.rms = true;
      run(far);
      run(site(post, 35, 136, 100, dtype));  // 256 ranks
    }
    for (const DType dtype : {kSingle, kBrain}) {  // rows that do not fit shared memory, in blocks of 64 and of 32
      run(site(post, 66, 520, 8, dtype), {1, 60 * 1024});
      SiteOptions wide = site(post, 34, 264, 8, dtype);
      wide.rms = true, wide.gap = 1;
      run(wide, {2, kLittle});
    }
    Machine fast;
    fast.fast = true;
    run(site(post, 35, 72, 40, kSingle), fast);
    // Frozen subsets, with rows that stay and that do not.
    for (const char* only : {"dx", "dsum", "dw_down", "db_down dscale", "dw_up", "dscale dx", "dweight", "dbias dsum db_up"}) {
      for (const bool fits : {true, false}) {
        const int64_t d = fits ? 72 : 264;
        SiteOptions some = site(post, 37, d, 12, kBrain);
        some.only = only, some.weights = kSingle, some.scale_size = some.only == "dscale dx" ? d : 1;
        run(some, {132, kLittle});
      }
    }
  }
  for (const DType dtype : {kBrain, kHalf}) {  // the sum in float32, as under autocast
    for (const int64_t shared : {kLeast, kLittle}) {
      SiteOptions mixed = site(true, 37, 264, 12, dtype);
      mixed.rows = mixed.weights = kSingle, mixed.sequential = false, mixed.offset = 100;
      run(mixed, {132, shared});
    }
  }
  const SiteOptions same = site(true, 200, 72, 8, kBrain);
  expect(run(same, {2}) == run(same, {2}), "two runs differ");
  return finish();
}
