// The operations of ops.h on CUDA, and one that the CPU does not need: torchbp/_cuda.so registers them when it is loaded.
#include "../ops.h"
#include "../optim_ops.h"

#include "backend.h"

namespace torchbp {

namespace {

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
