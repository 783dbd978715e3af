// The CUDA backend: what ops.h calls to run a description on a GPU. The functions are those of cpu/backend.h.
//
// Every call launches on the device of its description and on PyTorch's current stream of that device, and returns
// without waiting, with one exception: softmax_ce_forward with class indices waits for its kernel, so that an index out
// of range raises here. While the stream is being captured into a CUDA graph it cannot wait; such a row's loss is NaN.
//
// Every result is the same at each run: sums are made in an order that depends on the sizes alone.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../kernels.h"
#include "../optim.h"

namespace torchbp {

struct Cuda {
  static constexpr bool own_products = false;  // PyTorch's: cuBLAS

  static void elementwise(Kernel kernel, const Loop& loop);
  static void softmax_ce_forward(const SoftmaxCE& ce, Reduction reduction, void* loss, void* total);
  static void softmax_ce_backward(const SoftmaxCE& ce);
  static void maxout_forward(const Maxout& maxout);
  static void maxout_backward(const Maxout& maxout);
  static void add_sum_of_squares(const void* data, ScalarType dtype, int64_t n, void* result, int32_t device);

  static constexpr bool on_cpu = false;
  static void check_on_host(const char* op, const torch::stable::Tensor& step);
  static void check_update(const std::vector<Parameter>& parameters);
  static void update(const std::vector<Parameter>& parameters);
};

}  // namespace torchbp
