// The operations of torchbp.optim, written once for all devices: all parameters of an optimizer updated in one call.
//
// As ops.h does, a device's library names its Backend and calls register_optimizers<Backend>.
#pragma once

#include <torch/csrc/stable/library.h>

#include "check.h"
#include "optim.h"

namespace torchbp {

// Whether every element between the first and the last is one of t's: contiguous up to the order of dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline int32_t raw_dtype(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// What belongs to a parameter has to lie in memory as it does. The common case is told in a few nanoseconds, and on the
// CPU needs no look at devices: an operation would not run there if a tensor were elsewhere.
template <class Backend>
void check_layout(const char* op, const char* argument, const Tensor& t, const Tensor& parameter) {
  if constexpr (!Backend::on_cpu) check_device(op, argument, t, parameter);
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
template <class Backend>
void take_state(const char* op, Parameter& p, const Tensor& t, const std::vector<Tensor>& state, size_t& used) {
  const bool sgd = p.update.rule == Rule::sgd;
  const size_t wanted = sgd ? p.update.momentum != 0 : 3;
  STD_TORCH_CHECK(used + wanted <= state.size(), "torchbp::", op, ": state wants ",
                  sgd ? "the momentum buffer" : "exp_avg, exp_avg_sq and step", " of each parameter, got ",
                  state.size(), " tensors");
  for (size_t k = 0; k < std::min<size_t>(wanted, 2); ++k) {
    const Tensor& kept = state[used++];
    check_layout<Backend>(op, "state", kept, t);
    p.state[k] = kept.mutable_data_ptr();
  }
  if (sgd) return;
  const Tensor& step = state[used++];
  const ScalarType dtype = step.scalar_type();
  p.wide_step = dtype == ScalarType::Double;
  if constexpr (!Backend::on_cpu) Backend::check_on_host(op, step);
  STD_TORCH_CHECK(step.numel() == 1 && (p.wide_step || dtype == ScalarType::Float), "torchbp::", op,
                  ": state wants a float32 or float64 number as step");
  p.step = step.mutable_data_ptr();
}

// One step. state: of each parameter in turn what take_state says. groups: of each group in turn the number of its
// parameters and a row of hyperparameters (optim.h). Everything is checked before anything changes.
template <class Backend, Rule rule>
void update_(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads, const std::vector<Tensor>& state,
             const std::vector<double>& groups) {
  constexpr const char* op = rule == Rule::sgd ? "sgd_" : "adamw_";
  constexpr int64_t width = 1 + kHyper;
  STD_TORCH_CHECK(grads.size() == parameters.size(), "torchbp::", op, ": grads wants ", parameters.size(),
                  " tensors, got ", grads.size());
  STD_TORCH_CHECK(groups.size() % width == 0, "torchbp::", op, ": groups wants ", width, " numbers each, got ",
                  groups.size());
  std::vector<Parameter> all;
  all.reserve(parameters.size());
  size_t used = 0;
  for (size_t row = 0; row < groups.size(); row += width) {
    const Update update = update_of(rule, &groups[row + 1]);
    for (double k = 0; k < groups[row]; ++k) {
      const size_t i = all.size();
      STD_TORCH_CHECK(i < parameters.size(), "torchbp::", op, ": groups wants ", parameters.size(),
                      " parameters in all, got more");
      const Tensor& t = parameters[i];
      Parameter p;
      p.update = update;
      p.dtype = t.scalar_type();
      STD_TORCH_CHECK(is_floating(p.dtype), "torchbp::", op,
                      ": parameters wants dtype float64, float32, bfloat16 or float16");
      STD_TORCH_CHECK(is_dense(t), "torchbp::", op, ": parameters wants tensors without gaps or overlaps in memory");
      check_layout<Backend>(op, "grads", grads[i], t);
      p.device = t.get_device_index();
      p.n = t.numel();
      p.bytes = p.n * static_cast<int64_t>(t.element_size());
      p.data = t.mutable_data_ptr();
      p.grad = grads[i].const_data_ptr();
      take_state<Backend>(op, p, t, state, used);
      all.push_back(p);
    }
  }
  STD_TORCH_CHECK(all.size() == parameters.size(), "torchbp::", op, ": groups wants ", parameters.size(),
                  " parameters in all, got ", all.size());
  STD_TORCH_CHECK(used == state.size(), "torchbp::", op, ": state wants ", used, " tensors, got ", state.size());
  Backend::check_update(all);
  if (rule == Rule::adamw) advance(all);
  Backend::update(all);
}

template <class Backend>
void register_optimizers(torch::stable::detail::StableLibrary& m) {
  m.impl("sgd_", TORCH_BOX((&update_<Backend, Rule::sgd>)));
  m.impl("adamw_", TORCH_BOX((&update_<Backend, Rule::adamw>)));
}

}  // namespace torchbp
