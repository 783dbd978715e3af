// Kernels with a fault that the emulator has to show, and one without.
#include <torch/csrc/stable/library.h>

#include <string>

#define TORCHBP_LEVEL cuda
#include "../../../csrc/cuda/launch.h"

namespace torchbp {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 64;

enum Fault { none, no_barrier, barrier_in_a_branch, shuffle_in_a_branch };

// Reverses the threads' numbers through memory that they share.
template <Fault fault>
__global__ void reverse(float* to) {
  __shared__ float numbers[kThreads];
  numbers[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (fault == none || (fault == barrier_in_a_branch && threadIdx.x % 2)) __syncthreads();
  if (fault == shuffle_in_a_branch && threadIdx.x % 2) __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
  to[threadIdx.x] = numbers[kThreads - 1 - threadIdx.x];
  if (fault == none) __syncthreads();
  numbers[threadIdx.x] = -1;
}

template <Fault fault>
Tensor run(const Tensor& like) {
  const Tensor y = torch::stable::empty({kThreads}, like.scalar_type());
  const cuda::Launch launch("faults", -1);
  launch(reverse<fault>, 1, kThreads, static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

// What the block finds in the memory that it asked for, and beyond it.
__global__ void use_shared(float* to, int extra) {
  float* const memory = static_cast<float*>(cuda::dynamic_shared());
  to[threadIdx.x] = memory[threadIdx.x];
  __syncthreads();
  memory[threadIdx.x + extra] = 0;
}

template <int extra>
Tensor run_shared(const Tensor& like) {
  const Tensor y = torch::stable::empty({kThreads}, like.scalar_type());
  const cuda::Launch launch("faults", -1);
  launch.with_shared(kThreads * sizeof(float), use_shared, 1, kThreads, static_cast<float*>(y.mutable_data_ptr()),
                     extra);
  return y;
}

}  // namespace
}  // namespace torchbp

STABLE_TORCH_LIBRARY(torchbp_faults, m) {
  for (const char* name :
       {"none", "no_barrier", "barrier_in_a_branch", "shuffle_in_a_branch", "shared", "beyond_shared"})
    m.def((std::string(name) + "(Tensor like) -> Tensor").c_str());
}
STABLE_TORCH_LIBRARY_IMPL(torchbp_faults, CUDA, m) {
  m.impl("none", TORCH_BOX(&torchbp::run<torchbp::none>));
  m.impl("no_barrier", TORCH_BOX(&torchbp::run<torchbp::no_barrier>));
  m.impl("barrier_in_a_branch", TORCH_BOX(&torchbp::run<torchbp::barrier_in_a_branch>));
  m.impl("shuffle_in_a_branch", TORCH_BOX(&torchbp::run<torchbp::shuffle_in_a_branch>));
  m.impl("shared", TORCH_BOX(&torchbp::run_shared<0>));
  m.impl("beyond_shared", TORCH_BOX(&torchbp::run_shared<1>));
}
