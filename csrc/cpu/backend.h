// The CPU backend: what ops.h calls to run a description on the CPU, with threads and the SIMD level of the machine.
#pragma once

#include "../kernels.h"

namespace torchbp {

struct Cpu {
  static void elementwise(Kernel kernel, const Loop& loop);

  // loss [n] (reduction none) or one number, in the dtype of the input; total, in the compute dtype, what a mean was
  // divided by. Throws when a class index is out of range. Where ce.grad_input is given it receives the gradient too.
  static void softmax_ce_forward(const SoftmaxCE& ce, Reduction reduction, void* loss, void* total);
  static void softmax_ce_backward(const SoftmaxCE& ce);

  static void maxout_forward(const Maxout& maxout);
  static void maxout_backward(const Maxout& maxout);

  // Adds the sum of squares of n elements to *result, in the compute dtype.
  static void add_sum_of_squares(const void* data, ScalarType dtype, int64_t n, void* result, int32_t device);
};

// The level in use: "baseline", "avx2" or "avx512". TORCHBP_CPU forces one; it is read once.
const char* cpu_level();

}  // namespace torchbp
