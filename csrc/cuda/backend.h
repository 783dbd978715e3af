// The CUDA backend: what ops.h calls to run a description on a GPU. The functions are those of cpu/backend.h.
//
// Every call launches on the device of its description and on PyTorch's current stream of that device, and returns
// without waiting (but for the first product of a size with a ReLU or its gradient, which is tried out).
//
// So a class index out of range raises late: the loss is nan and the row counts nothing, and the next call of a
// cross-entropy or of its backward on that device which finds the kernel done raises. Nothing is poisoned, and everything
// goes on. Waiting for each loss would cost more than its kernel: the host could never run ahead. Where launches wait
// (CUDA_LAUNCH_BLOCKING=1) the call itself raises.
//
// Every result is the same at each run: sums are made in an order that depends on the sizes alone.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../activation.h"
#include "../kernels.h"
#include "../optim.h"

namespace torchbp {

struct Cuda {
  using Tensor = torch::stable::Tensor;

  // Products of this backend's own are those of a whole narrow network in a half type (narrow.cu), as cpu/backend.h has
  // them; those of a layer alone are cuBLASLt's or PyTorch's.
  static constexpr bool own_products = true;
  static bool fits(const Tensor&, int64_t, int64_t) { return false; }
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
  // relu(x W^T + b), and (dz^T x, sum of dz over the rows), of matrices, in one; nothing if cuBLASLt has no such product.
  static constexpr bool fused_products = true;
  static std::optional<Tensor> affine_relu(const Tensor& x, const Tensor& weight, const Tensor& bias);
  static std::optional<std::array<Tensor, 2>> weight_and_bias_gradient(const Tensor& dz, const Tensor& x);

  // dz W, of matrices, with the gradient of the ReLU that made h applied to it; nothing as above. With false, mlp's
  // backward does that in a pass of its own: no GPU has shown yet which is faster.
  static constexpr bool fused_relu_gradient = true;
  static std::optional<Tensor> product_through_relu(const Tensor& dz, const Tensor& weight, const Tensor& h);

  static void elementwise(Kernel kernel, const Loop& loop);
  // `total` may be null.
  static void softmax_ce_forward(const SoftmaxCE& ce, Reduction reduction, void* loss, void* total);
  static void softmax_ce_backward(const SoftmaxCE& ce);
  // From the gradient for an upstream gradient of 1, in ce.grad_input, to that for *ce.grad, which the GPU reads.
  static void softmax_ce_scale(const SoftmaxCE& ce, Reduction reduction);
  static void maxout_forward(const Maxout& maxout);
  static void maxout_backward(const Maxout& maxout);
  static void add_sum_of_squares(const void* data, ScalarType dtype, int64_t n, void* result, int32_t device);

  static constexpr bool on_cpu = false;
  static void check_on_host(const char* op, const torch::stable::Tensor& step);
  static void check_update(const std::vector<Parameter>& parameters);
  static void update(const std::vector<Parameter>& parameters);
};

}  // namespace torchbp
