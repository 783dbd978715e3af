// The columns of an activation, for kernels that are told only on the GPU which one it is.
#pragma once

#include <cuda_runtime.h>

#include "../columns.h"

namespace torchbp::cuda {

struct Nothing {
  template <class C, int n>
  static TORCHBP_INLINE void apply(const C (&in)[n], C (&out)[1], C) {
    out[0] = in[0];
  }
};

// f(column) with the column of a row that saves x or y, as activations do; without one, what changes nothing.
template <class F>
__device__ __forceinline__ void with_forward(Kernel kernel, const F& f) {
  switch (kernel) {
#define ROW(name, ...)                                               \
  case Kernel::name##_forward:                                       \
    if constexpr (name##_backward::inputs == 2) f(name##_forward()); \
    return;
    TORCHBP_UNARY_GATES(ROW)
#undef ROW
    default:
      f(Nothing());
  }
}
template <class F>
__device__ __forceinline__ void with_backward(Kernel kernel, const F& f) {
  switch (kernel) {
#define ROW(name, ...)                                                \
  case Kernel::name##_backward:                                       \
    if constexpr (name##_backward::inputs == 2) f(name##_backward()); \
    return;
    TORCHBP_UNARY_GATES(ROW)
#undef ROW
    default:
      f(Nothing());
  }
}

}  // namespace torchbp::cuda
