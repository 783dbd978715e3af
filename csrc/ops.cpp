// The schemas of torchbp's operations, and their CPU kernels.
//
// Python completes them (torchbp/functions/gate.py): fake kernels, vmap rules, and autograd through the Functions.
#include <string>

#include "cpu/backend.h"
#include "ops.h"
#include "optim_ops.h"

namespace torchbp {
namespace {

// name(Tensor x, float alpha) -> Tensor and name_backward(Tensor dy, Tensor saved, float alpha) -> Tensor.
void define_unary(StableLibrary& m, const std::string& name, const std::string& parameter, const std::string& saves) {
  const std::string more = parameter == "none" ? "" : ", float " + parameter;
  const std::string saved = saves == "nothing" ? "" : ", Tensor saved";
  m.def((name + "(Tensor x" + more + ") -> Tensor").c_str());
  m.def((name + "_backward(Tensor dy" + saved + more + ") -> Tensor").c_str());
}

void define_binary(StableLibrary& m, const std::string& name) {
  m.def((name + "(Tensor a, Tensor b) -> Tensor").c_str());
  m.def((name + "_backward(Tensor dy, Tensor a, Tensor b) -> (Tensor, Tensor)").c_str());
  m.def((name + "_backward_a(Tensor dy, Tensor a, Tensor b) -> Tensor").c_str());
  m.def((name + "_backward_b(Tensor dy, Tensor a, Tensor b) -> Tensor").c_str());
}

void define_operations(StableLibrary& m) {
#define ROW(name, parameter, forward, saves, ...) define_unary(m, #name, #parameter, #saves);
  TORCHBP_UNARY_GATES(ROW)
#undef ROW
#define ROW(name, ...) define_binary(m, #name);
  TORCHBP_BINARY_GATES(ROW)
#undef ROW
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, str activation, float parameter) -> (Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? saved, str activation, float parameter, "
      "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("mlp(Tensor x, Tensor[] weights, Tensor[] biases, str activation, float parameter) -> Tensor[]");
  m.def(
      "mlp_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor[] saved, str activation, float parameter, "
      "bool need_x, int[] need_weights, int[] need_biases) -> Tensor[]");
  m.def(
      "softmax_ce(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction, "
      "float label_smoothing) -> (Tensor, Tensor, Tensor)");
  m.def(
      "softmax_ce_with_gradient(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction, "
      "float label_smoothing) -> (Tensor, Tensor)");
  m.def(
      "softmax_ce_backward(Tensor dloss, Tensor input, Tensor target, Tensor? weight, Tensor lse, Tensor total, "
      "int ignore_index, int reduction, float label_smoothing, bool need_input, bool need_target) "
      "-> (Tensor, Tensor)");
  m.def("max_pieces(Tensor z) -> (Tensor, Tensor)");
  m.def("max_pieces_backward(Tensor dy, Tensor index, int pieces) -> Tensor");
  m.def("l2_penalty(Tensor[] tensors) -> Tensor");
}

// What no Function calls: there is one of each, without autograd.
void define_others(StableLibrary& m) {
  m.def("sgd_(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] state, float[] groups) -> ()");
  m.def("adamw_(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] state, float[] groups) -> ()");
}

}  // namespace
}  // namespace torchbp

STABLE_TORCH_LIBRARY(torchbp, m) {
  torchbp::define_operations(m);
  torchbp::define_others(m);
}
STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  torchbp::register_operations<torchbp::Cpu>(m);
  torchbp::register_optimizers<torchbp::Cpu>(m);
}

// The same without autograd, which the Functions call where nothing records or transforms them.
STABLE_TORCH_LIBRARY(torchbp_kernels, m) { torchbp::define_operations(m); }
STABLE_TORCH_LIBRARY_IMPL(torchbp_kernels, CPU, m) { torchbp::register_operations<torchbp::Cpu>(m); }
