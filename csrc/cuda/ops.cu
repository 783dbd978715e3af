// The operations of ops.h on CUDA, and one that the CPU does not need: torchbp/_cuda.so registers them when it is loaded.
#include "../ops.h"
#include "../optim_ops.h"

#include "backend.h"

namespace torchbp {

// The backend without a mlp_backward of its own.
struct PlainCuda : Cuda {};

// As in ops.h, but that a ReLU's gradient is applied by the product that it is applied to, where cuBLASLt does that.
template <>
std::vector<Tensor> mlp_backward<Cuda>(const Tensor& dy, const Tensor& x, const std::vector<Tensor>& weights,
                                       const std::vector<Tensor>& saved, const Text& activation, double parameter,
                                       bool need_x, const std::vector<int64_t>& need_weights,
                                       const std::vector<int64_t>& need_biases);

namespace {

// Whether mlp_backward's arguments are matrices of one dtype and device that fit together. What else they may be, and
// what is refused, is for ops.h.
bool are_matrices(const Tensor& dy, const Tensor& x, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& saved, size_t need_weights, size_t need_biases) {
  const size_t layers = weights.size();
  if (layers == 0 || saved.size() + 1 != layers || need_weights != layers) return false;
  if (need_biases != 0 && need_biases != layers) return false;
  const auto is_like_x = [&](const Tensor& t) {
    return t.dim() == 2 && t.scalar_type() == x.scalar_type() && t.is_cuda() == x.is_cuda() &&
           t.get_device_index() == x.get_device_index();
  };
  for (size_t i = 0; i < layers; ++i) {
    const Tensor &in = i == 0 ? x : saved[i - 1], &out = i + 1 < layers ? saved[i] : dy, &weight = weights[i];
    if (!is_like_x(in) || !is_like_x(out) || !is_like_x(weight) || in.size(0) != out.size(0) ||
        in.size(1) != weight.size(1) || out.size(1) != weight.size(0))
      return false;
  }
  return true;
}

// Turns the gradient that softmax_ce_with_gradient returned into that for an upstream gradient that the host has not seen:
// in place, and without a pass over it if that is 1.
void softmax_ce_scale(const Tensor& dinput, const Tensor& dloss, const Tensor& input_, const Tensor& target_,
                      std::optional<Tensor> weight_, int64_t ignore_index, int64_t reduction, double label_smoothing) {
  const char* op = "softmax_ce_scale_";
  const Tensor input = dense(input_), target = dense(target_);
  const auto weight = dense_if_any(weight_);
  SoftmaxCE ce = describe_softmax_ce(op, input, target, weight, ignore_index, label_smoothing);
  check_like(op, "dinput", dinput, input);
  check_shape(op, "dinput", dinput, {ce.n, ce.classes});
  STD_TORCH_CHECK(dinput.is_contiguous(), "torchbp::", op, ": dinput wants what softmax_ce_with_gradient returned");
  check_like(op, "dloss", dloss, input);
  check_shape(op, "dloss", dloss, {});
  ce.grad = dloss.const_data_ptr();
  ce.grad_input = dinput.mutable_data_ptr();
  Cuda::softmax_ce_scale(ce, reduction_of(reduction));
}

}  // namespace

template <>
std::vector<Tensor> mlp_backward<Cuda>(const Tensor& dy, const Tensor& x, const std::vector<Tensor>& weights,
                                       const std::vector<Tensor>& saved, const Text& activation, double parameter,
                                       bool need_x, const std::vector<int64_t>& need_weights,
                                       const std::vector<int64_t>& need_biases) {
  const Activation f = activation_of("mlp_backward", activation);
  if (!Cuda::fused_relu_gradient || f.forward != Kernel::relu_forward || Cuda::fits_network(x, weights, {}) ||
      !are_matrices(dy, x, weights, saved, need_weights.size(), need_biases.size()))
    return mlp_backward<PlainCuda>(dy, x, weights, saved, activation, parameter, need_x, need_weights, need_biases);
  const size_t layers = weights.size();
  std::vector<Tensor> result;
  while (result.size() < 1 + layers + need_biases.size()) result.push_back(nothing(x));
  // Below this layer nothing is asked for.
  size_t lowest = 0;
  const auto needs = [&](size_t i) { return need_weights[i] || (!need_biases.empty() && need_biases[i]); };
  while (!need_x && lowest + 1 < layers && !needs(lowest)) ++lowest;
  Tensor dz = dy;
  for (size_t i = layers; i-- > lowest;) {
    const Tensor& h = i == 0 ? x : saved[i - 1];
    const bool further = i > lowest || need_x;
    const auto through = i > lowest ? Cuda::product_through_relu(dz, weights[i], h) : std::nullopt;
    const auto [dh, dw, db] = affine_backward<Cuda>(dz, h, weights[i], further && !through, need_weights[i],
                                                    !need_biases.empty() && need_biases[i]);
    result[1 + i] = dw;
    if (!need_biases.empty()) result[1 + layers + i] = db;
    if (i == 0) result[0] = dh;
    if (i > lowest) dz = through ? *through : activate_backward<Cuda>(dh, h, f, parameter);
  }
  return result;
}

}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  torchbp::register_operations<torchbp::Cuda>(m);
  torchbp::register_optimizers<torchbp::Cuda>(m);
}
STABLE_TORCH_LIBRARY_IMPL(torchbp_kernels, CUDA, m) { torchbp::register_operations<torchbp::Cuda>(m); }

STABLE_TORCH_LIBRARY(torchbp_cuda, m) {
  m.def(
      "softmax_ce_scale_(Tensor(a!) dinput, Tensor dloss, Tensor input, Tensor target, Tensor? weight, int "
      "ignore_index, "
      "int reduction, float label_smoothing) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(torchbp_cuda, CUDA, m) { m.impl("softmax_ce_scale_", TORCH_BOX(&torchbp::softmax_ce_scale)); }
