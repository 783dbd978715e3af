// The CPU backend: what ops.h calls to run a description on the CPU, with threads and the SIMD level of the machine.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../activation.h"
#include "../batch.h"
#include "../kernels.h"
#include "../optim.h"

namespace torchbp {

struct Cpu {
  using Tensor = torch::stable::Tensor;

  // Memory for a result: from 1 MiB on it is kept for the next of its size (blocks.h).
  static Tensor empty_result(torch::headeronly::IntHeaderOnlyArrayRef sizes, const int64_t* strides, ScalarType dtype,
                             const Tensor& like);

  static void elementwise(Kernel kernel, const Loop& loop);

  // loss [n] (reduction none) or one number, in the dtype of the input; total, in the compute dtype, what a mean was
  // divided by. Throws when a class index is out of range. Where ce.grad_input is given it receives the gradient too.
  static void softmax_ce_forward(const SoftmaxCE& ce, Reduction reduction, void* loss, void* total);
  static void softmax_ce_backward(const SoftmaxCE& ce);

  static void maxout_forward(const Maxout& maxout);
  static void maxout_backward(const Maxout& maxout);

  // Adds the sum of squares of n elements to *result, in the compute dtype.
  static void add_sum_of_squares(const void* data, ScalarType dtype, int64_t n, void* result, int32_t device);

  // Products of this backend's own (products.cpp), where they fit: rows are those of x or dz. ops.h has checked the
  // arguments of linear, and falls back on PyTorch's where they do not fit.
  static constexpr bool own_products = true;
  static constexpr bool fused_products = false;  // what cuda/backend.h has
  static bool fits(const Tensor& rows, int64_t in, int64_t out);
  static std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Activation& f, double parameter);
  static std::array<Tensor, 3> affine_backward(const Tensor& dz, const std::optional<Tensor>& x,
                                               const std::optional<Tensor>& weight, bool need_x, bool need_weight,
                                               bool need_bias);
  static bool fits_network(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases);
  static std::vector<Tensor> mlp(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                 const Activation& f, double parameter);
  static bool fits_saved(const std::vector<Tensor>& saved, int64_t n);
  static std::vector<Tensor> mlp_backward(const Tensor& dy, const Tensor& x, const std::vector<Tensor>& weights,
                                          const std::vector<Tensor>& saved, const Activation& f, double parameter,
                                          bool need_x, const std::vector<int64_t>& need_weights,
                                          const std::vector<int64_t>& need_biases);

  // The operations of optim_ops.h. Raises, before anything changes, what stands in the way of a step.
  static constexpr bool on_cpu = true;
  static void check_update(const std::vector<Parameter>&) {}
  // One step for all parameters, in one pass over their memory.
  static void update(const std::vector<Parameter>& parameters);
  // Fills batch.out; or as many copies, `apart` bytes from one to the next, each by a thread of its own.
  static void batch(const Batch& batch, int64_t copies = 1, int64_t apart = 0);
};

// The level in use: "baseline", "avx2" or "avx512". TORCHBP_CPU forces one; it is read once.
const char* cpu_level();

}  // namespace torchbp
