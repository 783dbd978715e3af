// The kernels that are not elementwise: softmax cross-entropy, maxout, sums.
#include <torch/csrc/stable/ops.h>

#define TORCHBP_LEVEL cuda
#include "../softmax_ce.h"
#include "backend.h"
#include "launch.h"

namespace torchbp {
namespace cuda {
namespace {

// ---- groups of threads -------------------------------------------------------------------------------------------

// `width` threads of a block that work on one thing together: a warp, or several (then the whole block). All of them
// must reach each call; the order of every sum is fixed.
template <int width>
struct Group {
  static_assert(width % 32 == 0);
  static constexpr int size = width;
  const int rank = threadIdx.x % size;

  template <class C>
  __device__ __forceinline__ C sum(C v) const {
    return reduce(v, [](C a, C b) { return a + b; });
  }
  // Of term(0), ..., term(n - 1), in float64: float32 would lose digits over many.
  template <class F>
  __device__ __forceinline__ double sum_of(int64_t n, const F& term) const {
    double v = 0;
    for (int64_t i = rank; i < n; i += size) v += term(i);
    return sum(v);
  }
  // Of values that are not NaN.
  template <class C>
  __device__ __forceinline__ C max(C v) const {
    return reduce(v, [](C a, C b) { return a > b ? a : b; });
  }

private:
  template <class C, class Op>
  __device__ __forceinline__ C reduce(C v, Op op) const {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) v = op(v, __shfl_xor_sync(0xFFFFFFFFu, v, other));
    if constexpr (size > 32) {
      __shared__ C of_warp[size / 32];
      if (rank % 32 == 0) of_warp[rank / 32] = v;
      __syncthreads();
      v = of_warp[0];
      for (int warp = 1; warp < size / 32; ++warp) v = op(v, of_warp[warp]);
      __syncthreads();  // of_warp may be written again
    }
    return v;
  }
};

// Rows of a launch: a warp each up to kWarpClasses classes, else a block each.
constexpr int64_t kWarpClasses = 1024;
constexpr int kWarp = 32, kBlock = 512;

template <int width>
constexpr int kRowThreads = width == kWarp ? 128 : width;
template <int width>
constexpr int kRowsPerBlock = kRowThreads<width> / width;

// f(group, i) for each row i that this thread has a part in; the whole group runs through the same rows.
template <int width, class F>
__device__ __forceinline__ void for_rows(int64_t n, const F& f) {
  const Group<width> group;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock<width>;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock<width> + threadIdx.x / width; i < n; i += step)
    f(group, i);
}

// ---- softmax cross-entropy ---------------------------------------------------------------------------------------

// A row's largest x as the shift and the sum of exp(x - shift), in one pass over memory (Milakov and Gimelshein 2018):
// the sum so far is kept relative to the largest so far. A row of only -inf is shifted by 0: its sum of 0 gives PyTorch's
// nan. One that holds nan or +inf has the sum nan.
template <class Group, class T>
__device__ __forceinline__ void softmax(const Group& group, const T* x, int64_t classes, Compute<T>& shift,
                                        Compute<T>& sum) {
  using C = Compute<T>;
  constexpr int unroll = 4;  // elements that are read, and rescaled for, together
  constexpr C least = -std::numeric_limits<C>::infinity();
  const auto shift_of = [](C most) { return most == least ? C(0) : most; };
  C most = least, own = 0;
  for (int64_t c = group.rank; c < classes; c += unroll * Group::size) {
    C v[unroll], higher = most;
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      v[u] = c + u * Group::size < classes ? load(x[c + u * Group::size]) : least;
      higher = v[u] > higher ? v[u] : higher;
    }
    own *= exp(most - shift_of(higher));
#pragma unroll
    for (int u = 0; u < unroll; ++u) own += exp(v[u] - shift_of(higher));
    most = higher;
  }
  const C all = group.max(most);
  shift = shift_of(all);
  sum = group.sum(own * exp(most - shift));
}

// row_loss and row_weight of each row; `loss`, if given, receives the rows' losses in the dtype of the input.
template <class T, int width>
__global__ void __launch_bounds__(kRowThreads<width>) ce_forward(const __grid_constant__ SoftmaxCE a, T* loss) {
  using C = Compute<T>;
  for_rows<width>(a.n, [&](const Group<width>& group, int64_t i) {
    const Row<T> row(a, i);
    C shift, sum, lost = 0, counted = 0;
    softmax(group, row.x, a.classes, shift, sum);
    const C log_sum = log(sum);
    if (!row.ignored() && row.in_range()) row.loss(group, shift, log_sum, lost, counted);
    if (group.rank != 0) return;
    if (!row.ignored() && !row.in_range()) {
      lost = std::numeric_limits<C>::quiet_NaN();
      if (a.bad_row) atomicMin(reinterpret_cast<long long*>(a.bad_row), static_cast<long long>(i));
    }
    static_cast<C*>(a.lse)[i] = shift + log_sum;
    static_cast<C*>(a.row_loss)[i] = lost;
    static_cast<C*>(a.row_weight)[i] = counted;
    if (loss) store(loss + i, lost);
  });
}

template <class T, int width>
__global__ void __launch_bounds__(kRowThreads<width>) ce_backward(const __grid_constant__ SoftmaxCE a) {
  using C = Compute<T>;
  for_rows<width>(a.n, [&](const Group<width>& group, int64_t i) {
    const Row<T> row(a, i);
    if (a.grad_input) {
      C shift, sum;
      softmax(group, row.x, a.classes, shift, sum);  // the second pass over the row finds it in L2
      row.backward(group, shift, sum);
    }
    if (a.grad_probabilities) row.backward_probabilities(group, static_cast<const C*>(a.lse)[i]);
  });
}

constexpr int kSumThreads = 1024;

// The sum of n values by one block, in float64.
template <class C>
__device__ double block_sum(const C* x, int64_t n) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += x[i];
  return Group<kSumThreads>().sum(sum);
}

// From the rows to total and, unless each row keeps its own, the loss. One block.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    ce_reduce(const __grid_constant__ SoftmaxCE a, Reduction reduction, T* loss, Compute<T>* total) {
  using C = Compute<T>;
  const double counted = reduction == Reduction::mean ? block_sum(static_cast<const C*>(a.row_weight), a.n) : 1.0;
  const double lost = reduction == Reduction::none ? 0.0 : block_sum(static_cast<const C*>(a.row_loss), a.n);
  if (threadIdx.x != 0) return;
  *total = static_cast<C>(counted);
  if (reduction != Reduction::none) store(loss, static_cast<C>(lost / counted));
}

// ---- maxout ------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads) maxout_forward(Maxout a) {
  const T* const all = static_cast<const T*>(a.z);
  for (int64_t i = thread_index(); i < a.n * a.out; i += thread_count()) {
    const int64_t row = i / a.out;
    const T* z = all + row * a.pieces * a.out + (i - row * a.out);
    T best = *z;
    int index = 0;
    for (int piece = 1; piece < a.pieces; ++piece) {
      z += a.out;
      const T here = *z;
      const bool wins = (load(here) > load(best)) | (isnan(load(here)) & !isnan(load(best)));
      best = wins ? here : best;  // the first of equals; nan beats all
      index = wins ? piece : index;
    }
    static_cast<T*>(a.y)[i] = best;
    a.index[i] = static_cast<uint8_t>(index);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) maxout_backward(Maxout a) {
  for (int64_t i = thread_index(); i < a.n * a.out; i += thread_count()) {
    const int64_t row = i / a.out;
    T* dz = static_cast<T*>(a.grad_z) + row * a.pieces * a.out + (i - row * a.out);
    const T dy = static_cast<const T*>(a.grad_y)[i];
    const int index = a.index[i];
    for (int piece = 0; piece < a.pieces; ++piece, dz += a.out) *dz = index == piece ? dy : T(0);
  }
}

// ---- sums --------------------------------------------------------------------------------------------------------

// Each block adds the squares of its share, in float64.
constexpr int64_t kMostPartial = 1024;

template <class T>
__global__ void __launch_bounds__(kThreads) squares(const T* x, int64_t n, double* partial) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = thread_index(); i < n; i += thread_count()) {
    const double v = load(x[i]);
    sum += v * v;
  }
  sum = Group<kThreads>().sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <class C>
__global__ void __launch_bounds__(kSumThreads) add_sum(const double* partial, int64_t n, C* result) {
  const double sum = block_sum(partial, n);
  if (threadIdx.x == 0) *result += static_cast<C>(sum);
}

// ---- memory of our own -------------------------------------------------------------------------------------------

// From PyTorch's caching allocator, which knows the stream and CUDA graphs.
torch::stable::Tensor scratch(ScalarType dtype, int64_t n, int32_t device) {
  return torch::stable::empty({n}, dtype, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
}

}  // namespace
}  // namespace cuda

using cuda::Compute;
using cuda::Launch;
using cuda::with_type;

namespace {

// Launches the kernel for few or for many classes.
template <class Warp, class Block, class... Arguments>
void launch_rows(const Launch& launch, const SoftmaxCE& ce, Warp per_warp, Block per_block, Arguments... arguments) {
  using cuda::kRowsPerBlock, cuda::kRowThreads, cuda::kWarp, cuda::kBlock;
  if (ce.n == 0) return;
  if (ce.classes <= cuda::kWarpClasses)
    launch(per_warp, cuda::blocks_for(ce.n, kRowsPerBlock<kWarp>), kRowThreads<kWarp>, ce, arguments...);
  else
    launch(per_block, cuda::blocks_for(ce.n, kRowsPerBlock<kBlock>), kRowThreads<kBlock>, ce, arguments...);
}

}  // namespace

void Cuda::softmax_ce_forward(const SoftmaxCE& ce, Reduction reduction, void* loss, void* total) {
  const Launch launch("softmax_ce", ce.device);
  const bool check_targets = !ce.soft && ce.n > 0 && !launch.capturing();

  // The smallest bad row, or what it started as: every byte 0x7F, more than any row.
  constexpr int byte = 0x7F;
  constexpr int64_t none = 0x7F7F7F7F7F7F7F7F;
  SoftmaxCE rows = ce;
  const ScalarType compute = ce.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const torch::stable::Tensor row_loss = cuda::scratch(compute, ce.n, ce.device);
  const torch::stable::Tensor row_weight = cuda::scratch(compute, ce.n, ce.device);
  rows.row_loss = row_loss.mutable_data_ptr();
  rows.row_weight = row_weight.mutable_data_ptr();
  torch::stable::Tensor bad_row;
  if (check_targets) {
    bad_row = cuda::scratch(ScalarType::Long, 1, ce.device);
    rows.bad_row = static_cast<int64_t*>(bad_row.mutable_data_ptr());
    launch.check(cudaMemsetAsync(rows.bad_row, byte, sizeof(int64_t), launch.stream()));
  }
  with_type(ce.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_rows(launch, rows, cuda::ce_forward<T, cuda::kWarp>, cuda::ce_forward<T, cuda::kBlock>,
                reduction == Reduction::none ? static_cast<T*>(loss) : nullptr);
    launch(cuda::ce_reduce<T>, 1, cuda::kSumThreads, rows, reduction, static_cast<T*>(loss),
           static_cast<Compute<T>*>(total));
  });
  if (!check_targets) return;

  int64_t bad = none, target = 0;
  const auto fetch = [&](int64_t& to, const int64_t* from) {
    launch.check(cudaMemcpyAsync(&to, from, sizeof(to), cudaMemcpyDeviceToHost, launch.stream()));
    launch.check(cudaStreamSynchronize(launch.stream()));
  };
  fetch(bad, rows.bad_row);
  if (bad == none) return;
  fetch(target, ce.target + bad);
  STD_TORCH_CHECK(false, "torchbp::softmax_ce: target ", target, " in row ", bad, " is out of range for ", ce.classes,
                  " classes");
}

void Cuda::softmax_ce_backward(const SoftmaxCE& ce) {
  const Launch launch("softmax_ce_backward", ce.device);
  with_type(ce.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_rows(launch, ce, cuda::ce_backward<T, cuda::kWarp>, cuda::ce_backward<T, cuda::kBlock>);
  });
}

void Cuda::maxout_forward(const Maxout& maxout) {
  if (maxout.n * maxout.out == 0) return;
  const Launch launch("max_pieces", maxout.device);
  with_type(maxout.dtype, [&](auto zero) {
    launch(cuda::maxout_forward<decltype(zero)>, cuda::blocks_for(maxout.n * maxout.out, cuda::kThreads),
           cuda::kThreads, maxout);
  });
}

void Cuda::maxout_backward(const Maxout& maxout) {
  if (maxout.n * maxout.out == 0) return;
  const Launch launch("max_pieces_backward", maxout.device);
  with_type(maxout.dtype, [&](auto zero) {
    launch(cuda::maxout_backward<decltype(zero)>, cuda::blocks_for(maxout.n * maxout.out, cuda::kThreads),
           cuda::kThreads, maxout);
  });
}

void Cuda::add_sum_of_squares(const void* data, ScalarType dtype, int64_t n, void* result, int32_t device) {
  if (n == 0) return;
  const Launch launch("l2_penalty", device);
  // As many partial sums as n asks for, whatever the GPU: the same n gives the same order of additions.
  const int64_t blocks = std::min<int64_t>(cuda::blocks_for(n, 16 * cuda::kThreads), cuda::kMostPartial);
  const torch::stable::Tensor partial = cuda::scratch(ScalarType::Double, blocks, device);
  double* const sums = static_cast<double*>(partial.mutable_data_ptr());
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(cuda::squares<T>, static_cast<unsigned>(blocks), cuda::kThreads, static_cast<const T*>(data), n, sums);
    launch(cuda::add_sum<Compute<T>>, 1, cuda::kSumThreads, sums, blocks, static_cast<Compute<T>*>(result));
  });
}

}  // namespace torchbp
