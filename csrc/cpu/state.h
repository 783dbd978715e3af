// What the operations that update parameters check of them, of their gradients and of an optimizer's state.
#pragma once

#include "../check.h"
#include "../optim.h"

namespace torchbp {

inline int32_t raw_dtype(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// What belongs to a parameter has to lie in memory as it does. The common case is told in a few nanoseconds, and needs
// no look at devices: an operation would not run on the CPU if a tensor were elsewhere.
inline void check_layout(const char* op, const char* argument, const Tensor& t, const Tensor& parameter) {
  const bool same = same_shape(t, parameter), contiguous = t.is_contiguous() && parameter.is_contiguous();
  if (same && contiguous && raw_dtype(t) == raw_dtype(parameter)) return;
  check_like(op, argument, t, parameter);
  bool fits = same;
  for (int64_t d = 0; fits && !contiguous && d < t.dim(); ++d)
    fits = t.size(d) == 1 || t.stride(d) == parameter.stride(d);
  STD_TORCH_CHECK(fits, "torchbp::", op, ": ", argument, " wants the shape and the strides of its parameter, ",
                  shape_text(parameter), ", got ", shape_text(t));
}

// Takes from `state`, of which `used` tensors are taken, what the optimizer keeps for the parameter t that p describes:
// the momentum buffer, if p.update has momentum, or exp_avg, exp_avg_sq and step.
inline void take_state(const char* op, Parameter& p, const Tensor& t, const std::vector<Tensor>& state, size_t& used) {
  const bool sgd = p.update.rule == Rule::sgd;
  const size_t wanted = sgd ? p.update.momentum != 0 : 3;
  STD_TORCH_CHECK(used + wanted <= state.size(), "torchbp::", op, ": state wants ",
                  sgd ? "the momentum buffer" : "exp_avg, exp_avg_sq and step", " of each parameter, got ",
                  state.size(), " tensors");
  for (size_t k = 0; k < std::min<size_t>(wanted, 2); ++k) {
    const Tensor& kept = state[used++];
    check_layout(op, "state", kept, t);
    p.state[k] = kept.mutable_data_ptr();
  }
  if (sgd) return;
  const Tensor& step = state[used++];
  const ScalarType dtype = step.scalar_type();
  p.wide_step = dtype == ScalarType::Double;
  STD_TORCH_CHECK(step.numel() == 1 && (p.wide_step || dtype == ScalarType::Float), "torchbp::", op,
                  ": state wants a float32 or float64 number as step");
  p.step = step.mutable_data_ptr();
}

inline void check_all_taken(const char* op, const std::vector<Tensor>& state, size_t used) {
  STD_TORCH_CHECK(used == state.size(), "torchbp::", op, ": state wants ", used, " tensors, got ", state.size());
}

}  // namespace torchbp
