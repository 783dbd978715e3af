// Kernels with a fault that the emulator has to show, and one without.
#include <torch/csrc/stable/library.h>

#include <string>

#define TORCHBP_LEVEL cuda
#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/tensor_core.h"

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

// Writes the rows of four blocks of 8 x 8, numbered through, each by another lane than the one that names it to
// load_blocks: what the lanes get of the transposed first one.
template <bool barrier>
__global__ void load_transposed(float* to) {
  alignas(16) __shared__ cuda::Half rows[32][8];
  const int lane = threadIdx.x % 32;
  for (int c = 0; c < 8; ++c) cuda::store(&rows[31 - lane][c], static_cast<float>(8 * (31 - lane) + c));
  if (barrier) __syncwarp();
  uint32_t blocks[4];
  cuda::load_blocks<true>(blocks, rows[lane]);
  const auto pair = cuda::bits<cuda::Pack<cuda::Half, 2>>(blocks[0]);
  to[2 * lane] = cuda::load(pair.value[0]);
  to[2 * lane + 1] = cuda::load(pair.value[1]);
  __syncwarp();
  for (int c = 0; c < 8; ++c) rows[lane][c] = cuda::Half(-1);
}

template <bool barrier>
Tensor run_transposed(const Tensor& like) {
  const Tensor y = torch::stable::empty({kThreads}, like.scalar_type());
  const cuda::Launch launch("faults", -1);
  launch(load_transposed<barrier>, 1, 32, static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

}  // namespace
}  // namespace torchbp

STABLE_TORCH_LIBRARY(torchbp_faults, m) {
  for (const char* name : {"none", "no_barrier", "barrier_in_a_branch", "shuffle_in_a_branch", "shared",
                           "beyond_shared", "blocks", "blocks_no_barrier"})
    m.def((std::string(name) + "(Tensor like) -> Tensor").c_str());
}
STABLE_TORCH_LIBRARY_IMPL(torchbp_faults, CUDA, m) {
  m.impl("none", TORCH_BOX(&torchbp::run<torchbp::none>));
  m.impl("no_barrier", TORCH_BOX(&torchbp::run<torchbp::no_barrier>));
  m.impl("barrier_in_a_branch", TORCH_BOX(&torchbp::run<torchbp::barrier_in_a_branch>));
  m.impl("shuffle_in_a_branch", TORCH_BOX(&torchbp::run<torchbp::shuffle_in_a_branch>));
  m.impl("shared", TORCH_BOX(&torchbp::run_shared<0>));
  m.impl("beyond_shared", TORCH_BOX(&torchbp::run_shared<1>));
  m.impl("blocks", TORCH_BOX(&torchbp::run_transposed<true>));
  m.impl("blocks_no_barrier", TORCH_BOX(&torchbp::run_transposed<false>));
}
