// The optimizers: up to kMost parameters in one launch.
#define TORCHBP_LEVEL cuda
#include "backend.h"
#include "launch.h"
#include "rules.h"

namespace torchbp {
namespace cuda {
namespace {

constexpr int kUnroll = 4;  // elements of a thread
constexpr int64_t kShare = kThreads * kUnroll;

// Parameters of one dtype, as a kernel takes them: at most 4 KiB.
constexpr int kMost = 64;
struct Parameters {
  int count = 0;
  unsigned blocks[kMost + 1] = {0};  // parameter k is the work of blocks [blocks[k], blocks[k + 1])
  int64_t n[kMost];
  void* data[kMost];
  const void* grad[kMost];
  void* state[2][kMost];
};

// The parameter that this block works on: the last one that begins here or before.
__device__ __forceinline__ int parameter_of_block(const Parameters& all) {
  int k = 0, end = all.count;
  while (end - k > 1) {
    const int middle = (k + end) / 2;
    (all.blocks[middle] <= blockIdx.x ? k : end) = middle;
  }
  return k;
}

// This block's share of parameter k.
template <class T, class Rule>
__device__ __forceinline__ void update_share(const Parameters& all, int k, const Rule& rule) {
  const int64_t first = static_cast<int64_t>(blockIdx.x - all.blocks[k]) * kShare + threadIdx.x;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads;
    if (i < all.n[k])
      rule(static_cast<T*>(all.data[k]), static_cast<const T*>(all.grad[k]), static_cast<T*>(all.state[0][k]),
           static_cast<T*>(all.state[1][k]), i);
  }
}

template <class T, class Rule>
__global__ void __launch_bounds__(kThreads) step(const __grid_constant__ Parameters all, const Rule rule) {
  update_share<T>(all, parameter_of_block(all), rule);
}

__global__ void __launch_bounds__(kThreads)
    step_by(const __grid_constant__ Parameters all, const AnyRule* __restrict__ rules) {
  const int k = parameter_of_block(all);
  rules[k].visit([&](const auto& rule) { update_share<float>(all, k, rule); });
}

// Adds one to those of a launch. 2^31 blocks would be of more elements than any memory holds.
void add(Parameters& all, const Parameter& p) {
  const int k = all.count++;
  all.n[k] = p.n;
  all.data[k] = p.data;
  all.grad[k] = p.grad;
  for (int s = 0; s < 2; ++s) all.state[s][k] = p.state[s];
  all.blocks[k + 1] = all.blocks[k] + blocks_for(p.n, kShare);
}

// Those that share memory are updated in turn, as one after the other would be.
size_t most_at_once(const std::vector<Parameter>& parameters) { return overlap(parameters) ? 1 : kMost; }

bool alike(const Parameter& a, const Parameter& b) {
  return a.update == b.update && a.dtype == b.dtype && a.device == b.device;
}

}  // namespace

void update_by(const char* op, const std::vector<Parameter>& parameters, const AnyRule* rules) {
  const size_t most = most_at_once(parameters);
  for (size_t i = 0; i < parameters.size(); i += most) {
    Parameters all;
    for (size_t k = i; k < std::min(i + most, parameters.size()); ++k) add(all, parameters[k]);
    const Launch launch(op, parameters[i].device);
    launch(step_by, all.blocks[all.count], kThreads, all, rules + i);
  }
}

}  // namespace cuda

void Cuda::check_on_host(const char* op, const torch::stable::Tensor& step) {
  STD_TORCH_CHECK(step.is_cpu(), "torchbp::", op, ": state wants the step on the CPU");
}

void Cuda::check_update(const std::vector<Parameter>& parameters) {
  if (parameters.empty()) return;
  for (const Parameter& p : parameters)  // the CPU has the index -1
    STD_TORCH_CHECK((p.device < 0) == (parameters[0].device < 0),
                    "torchbp: parameters want the CPU or GPUs, got both in one call");
  if (parameters[0].update.rule != Rule::adamw) return;
  // The count of steps is the host's: a graph would do the same step again and again.
  const cuda::Launch launch("adamw_", parameters[0].device);
  STD_TORCH_CHECK(!launch.capturing(), "torchbp::adamw_: a CUDA graph wants an optimizer made with capturable=True");
}

void Cuda::update(const std::vector<Parameter>& parameters) {
  const size_t most = cuda::most_at_once(parameters);
  for (size_t i = 0; i < parameters.size();) {
    const Parameter& first = parameters[i];
    const char* const op = first.update.rule == Rule::sgd ? "sgd_" : "adamw_";
    cuda::Parameters all;
    for (size_t taken = 0; taken < most && i < parameters.size() && cuda::alike(parameters[i], first); ++i, ++taken)
      if (parameters[i].n) cuda::add(all, parameters[i]);
    if (all.count == 0) continue;
    const cuda::Launch launch(op, first.device);
    cuda::with_type(first.dtype, [&](auto zero) {
      using T = decltype(zero);
      cuda::with_rule<cuda::Compute<T>>(first.update, [&](const auto& rule) {
        launch(cuda::step<T, std::decay_t<decltype(rule)>>, all.blocks[all.count], cuda::kThreads, all, rule);
      });
    });
  }
}

}  // namespace torchbp
