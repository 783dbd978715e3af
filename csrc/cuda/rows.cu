// Maxout, and sums of squares.
#define TORCHBP_LEVEL cuda
#include "../dtype.h"
#include "backend.h"
#include "group.h"
#include "launch.h"

namespace torchbp {
namespace cuda {
namespace {

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
constexpr int kSumThreads = 1024;

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
  const double sum = Group<kSumThreads>().sum_of(n, [&](int64_t i) { return partial[i]; });
  if (threadIdx.x == 0) *result += static_cast<C>(sum);
}

}  // namespace
}  // namespace cuda

using cuda::Compute;
using cuda::Launch;
using cuda::with_type;

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
