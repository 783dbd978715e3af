// Threads of a block that work on one thing together, and the softmax of a row that they share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "../dtype.h"

namespace torchbp::cuda {

// `width` threads: one, a warp, or several warps (then the whole block). All of them must reach each call; the order of
// every sum is fixed.
template <int width>
struct Group {
  static_assert(width == 1 || width % 32 == 0);
  static constexpr int size = width;
  const int rank = threadIdx.x % size;

  // What one of them has written before, the others see after.
  __device__ __forceinline__ void sync() const {
    if constexpr (size > 32)
      __syncthreads();
    else if constexpr (size == 32)
      __syncwarp();
  }
  template <class C>
  __device__ __forceinline__ C sum(C v) const {
    return reduce(v, [](C a, C b) { return a + b; });
  }
  // Of term(0), ..., term(n - 1), in float64: float32 would lose digits over many.
  template <class F>
  __device__ __forceinline__ double sum_of(int64_t n, const F& term) const {
    double v = 0;
#pragma unroll 4
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
    if constexpr (size >= 32) {
#pragma unroll
      for (int other = 16; other > 0; other /= 2) v = op(v, __shfl_xor_sync(0xFFFFFFFFu, v, other));
    }
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

// A row's largest x as the shift and the sum of exp(x - shift), in one pass (Milakov and Gimelshein 2018): the sum so far
// is kept relative to the largest so far. A row of only -inf is shifted by 0: its sum of 0 gives PyTorch's nan. One that
// holds nan or +inf has the sum nan.
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

}  // namespace torchbp::cuda
