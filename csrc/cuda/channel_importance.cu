// Scores of channels from an activation and its gradient, each read once. A block takes 64 channels over a group of rows
// (of whole samples where each sample's sum is squared): 8 threads side by side with 8 channels each, 16 bytes of 16-bit
// elements, and 32 of those down the rows. Up to eight rows are summed in float and then in double, because a square
// doubles the relative error.
#include "kernels.h"
#include "tiles.h"

namespace petl::cuda {
namespace {

constexpr int kAcross = 8, kChannels = 8, kBlockChannels = kAcross * kChannels, kDown = kThreads / kAcross;
constexpr int kFloatRows = 8;

struct Importance {
  int64_t n, unit_rows, units, group_units;  // units: rows, or samples of unit_rows rows
  int d;
  Source activation, grad;
  Reduction reduction;
  double* parts;  // [groups, d]
};

PETL_DEVICE void load_channels(float (&values)[kChannels], const Source& m, int64_t row, int col) {
  const int64_t at = row * m.stride + col;
  if (m.vectors && col + kChannels <= m.cols && m.dtype == DType::kFloat32) {
    const auto* from = reinterpret_cast<const Chunk<float>*>(static_cast<const float*>(m.data) + at);
    const Chunk<float> halves[2] = {from[0], from[1]};
#pragma unroll
    for (int i = 0; i < kChannels; ++i) values[i] = halves[i / 4].values[i % 4];
  } else if (m.vectors && col + kChannels <= m.cols) {
    const auto chunk = *reinterpret_cast<const Chunk<bf16>*>(static_cast<const bf16*>(m.data) + at);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      values[i] = m.dtype == DType::kBFloat16 ? to_float(chunk.values[i]) : to_float(f16{chunk.values[i].bits});
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) values[i] = col + i < m.cols ? load_float(m.data, m.dtype, at + i) : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads) channel_importance_kernel(const __grid_constant__ Importance call) {
  double* const shared = reinterpret_cast<double*>(shared_memory());  // [kDown, kBlockChannels]
  const int across = static_cast<int>(threadIdx.x) % kAcross, down = static_cast<int>(threadIdx.x) / kAcross;
  const int col = static_cast<int>(blockIdx.x) * kBlockChannels + across * kChannels;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * call.group_units;
  const int64_t end = first + call.group_units < call.units ? first + call.group_units : call.units;
  const bool by_sample = call.reduction == Reduction::kSqSample, square_rows = by_sample && call.unit_rows == 1;

  double sums[kChannels] = {};
  const auto walk = [&](int64_t begin_row, int64_t end_row) {
    float some[kChannels] = {};
    int held = 0;
    for (int64_t row = begin_row + down; row < end_row; row += kDown) {
      float a[kChannels], g[kChannels];
      load_channels(a, call.activation, row, col);
      load_channels(g, call.grad, row, col);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const float product = a[i] * g[i];
        some[i] += call.reduction == Reduction::kAbs ? fabsf(product) : square_rows ? product * product : product;
      }
      if (++held == kFloatRows) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) sums[i] += some[i], some[i] = 0;
        held = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sums[i] += some[i];
  };
  // The threads' sums of one channel, in their order, by the first 64 threads.
  double total = 0;
  const auto add_up = [&](bool square) {
    sync_block();
#pragma unroll
    for (int i = 0; i < kChannels; ++i) shared[down * kBlockChannels + across * kChannels + i] = sums[i], sums[i] = 0;
    sync_block();
    if (threadIdx.x >= kBlockChannels) return;
    double sum = 0;
    for (int i = 0; i < kDown; ++i) sum += shared[i * kBlockChannels + static_cast<int>(threadIdx.x)];
    total += square ? sum * sum : sum;
  };
  if (by_sample && !square_rows) {
    for (int64_t sample = first; sample < end; ++sample) {
      walk(sample * call.unit_rows, (sample + 1) * call.unit_rows);
      add_up(true);
    }
  } else {
    walk(first * call.unit_rows, end * call.unit_rows);
    add_up(false);
  }
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kBlockChannels + threadIdx.x;
  if (threadIdx.x < kBlockChannels && channel < call.d) call.parts[blockIdx.y * static_cast<int64_t>(call.d) + channel] = total;
}

struct Scores {
  int64_t groups, d;
  const double* parts;
  bool square;
  float* scores;
};

__global__ void __launch_bounds__(kThreads) channel_scores_kernel(const __grid_constant__ Scores call) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= call.d) return;
  double sum = 0;
  for (int64_t p = 0; p < call.groups; ++p) sum += call.parts[p * call.d + channel];
  call.scores[channel] = static_cast<float>(call.square ? sum * sum : sum);
}

struct Plan {
  int64_t unit_rows, units, groups, group_units;
};

// Four blocks per processor, of at least eight rows per thread; at most 256 groups, which the sum reads one by one.
Plan plan(const ChannelImportance& c, const Launch& launch) {
  Plan p{c.reduction == Reduction::kSqSample ? c.sample_rows : 1, 0, 1, 0};
  p.units = c.n / p.unit_rows;
  const int64_t wanted = cdiv(4 * static_cast<int64_t>(launch.processors), cdiv(c.d, kBlockChannels));
  const int64_t most = c.n / (kDown * kFloatRows), least = wanted < most ? wanted : most;
  const int64_t groups = least < 1 ? 1 : least > 256 ? 256 : least;
  p.group_units = cdiv(p.units, groups);
  p.groups = cdiv(p.units, p.group_units);
  return p;
}

}  // namespace

int64_t channel_importance_workspace(const ChannelImportance& c, const Launch& launch) {
  return plan(c, launch).groups * c.d * static_cast<int64_t>(sizeof(double));
}

void channel_importance(const ChannelImportance& c, const Launch& launch, void* workspace) {
  const DeviceGuard guard(launch.device);
  const Plan p = plan(c, launch);
  auto* const parts = static_cast<double*>(workspace);
  const Importance call{c.n, p.unit_rows, p.units, p.group_units, static_cast<int>(c.d), source(c.activation, c.n, c.d),
                        source(c.grad, c.n, c.d), c.reduction, parts};
  petl::cuda::launch(channel_importance_kernel,
                     dim3(static_cast<unsigned>(cdiv(c.d, kBlockChannels)), static_cast<unsigned>(p.groups)), kThreads,
                     kDown * kBlockChannels * static_cast<int64_t>(sizeof(double)), launch.stream, call);
  const Scores scores{p.groups, c.d, parts, c.reduction == Reduction::kSqBatch, static_cast<float*>(c.scores.data)};
  petl::cuda::launch(channel_scores_kernel, dim3(static_cast<unsigned>(cdiv(c.d, kThreads))), kThreads, 0, launch.stream,
                     scores);
}

}  // namespace petl::cuda
