// The operations of torchbp.optim: all parameters of an optimizer updated in one call.
#include <torch/csrc/stable/library.h>

#include "../check.h"
#include "backend.h"

namespace torchbp {
namespace {

// Whether every element between the first and the last is one of t's: contiguous up to the order of dimensions.
bool is_dense(const Tensor& t) {
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

int32_t raw_dtype(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// What belongs to a parameter, its gradient or its state, has to lie in memory as it does. The common case is told in a
// few nanoseconds, and needs no look at devices: this operation would not run on the CPU if one were elsewhere.
void check_layout(const char* op, const char* argument, const Tensor& t, const Tensor& parameter) {
  const bool same = same_shape(t, parameter), contiguous = t.is_contiguous() && parameter.is_contiguous();
  if (same && contiguous && raw_dtype(t) == raw_dtype(parameter)) return;
  check_like(op, argument, t, parameter);
  bool fits = same;
  for (int64_t d = 0; fits && !contiguous && d < t.dim(); ++d)
    fits = t.size(d) == 1 || t.stride(d) == parameter.stride(d);
  STD_TORCH_CHECK(fits, "torchbp::", op, ": ", argument, " wants the shape and the strides of its parameter, ",
                  shape_text(parameter), ", got ", shape_text(t));
}

void check_count(const char* op, const char* argument, size_t got, size_t wanted) {
  STD_TORCH_CHECK(got == wanted, "torchbp::", op, ": ", argument, " wants ", wanted, " of them, got ", got);
}

// The parameters with their gradients and updates; their state is left to be filled in. Nothing is changed.
// groups: of each the number of its parameters, which come in this order, and a row of hyperparameters (optim.h).
std::vector<Parameter> describe(const char* op, Rule rule, const std::vector<Tensor>& parameters,
                                const std::vector<Tensor>& grads, const std::vector<double>& groups) {
  constexpr int64_t width = 1 + kHyper;
  check_count(op, "grads", grads.size(), parameters.size());
  STD_TORCH_CHECK(groups.size() % width == 0, "torchbp::", op, ": groups wants ", width, " numbers each, got ",
                  groups.size());
  std::vector<Parameter> result;
  result.reserve(parameters.size());
  for (size_t row = 0; row < groups.size(); row += width) {
    const Update update = update_of(rule, &groups[row + 1]);
    for (double k = 0; k < groups[row]; ++k) {
      const size_t i = result.size();
      STD_TORCH_CHECK(i < parameters.size(), "torchbp::", op, ": groups wants ", parameters.size(),
                      " parameters in all, got more");
      const Tensor& t = parameters[i];
      Parameter p;
      p.update = update;
      p.dtype = t.scalar_type();
      STD_TORCH_CHECK(is_floating(p.dtype), "torchbp::", op,
                      ": parameters wants dtype float64, float32, bfloat16 or float16");
      STD_TORCH_CHECK(is_dense(t), "torchbp::", op, ": parameters wants tensors without gaps or overlaps in memory");
      check_layout(op, "grads", grads[i], t);
      p.n = t.numel();
      p.data = t.mutable_data_ptr();
      p.grad = grads[i].const_data_ptr();
      result.push_back(p);
    }
  }
  STD_TORCH_CHECK(result.size() == parameters.size(), "torchbp::", op, ": groups wants ", parameters.size(),
                  " parameters in all, got ", result.size());
  return result;
}

// momentum_buffers: of the parameters of those groups that have momentum.
void sgd_(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
          const std::vector<Tensor>& momentum_buffers, const std::vector<double>& groups) {
  std::vector<Parameter> all = describe("sgd_", Rule::sgd, parameters, grads, groups);
  size_t next = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].update.momentum == 0) continue;
    STD_TORCH_CHECK(next < momentum_buffers.size(),
                    "torchbp::sgd_: momentum_buffers wants one for each parameter whose "
                    "group has momentum, got ",
                    momentum_buffers.size());
    check_layout("sgd_", "momentum_buffers", momentum_buffers[next], parameters[i]);
    all[i].state[0] = momentum_buffers[next++].mutable_data_ptr();
  }
  check_count("sgd_", "momentum_buffers", momentum_buffers.size(), next);
  Cpu::update(all);
}

void adamw_(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
            const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
            const std::vector<Tensor>& steps, const std::vector<double>& groups) {
  std::vector<Parameter> all = describe("adamw_", Rule::adamw, parameters, grads, groups);
  check_count("adamw_", "exp_avgs", exp_avgs.size(), all.size());
  check_count("adamw_", "exp_avg_sqs", exp_avg_sqs.size(), all.size());
  check_count("adamw_", "steps", steps.size(), all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    check_layout("adamw_", "exp_avgs", exp_avgs[i], parameters[i]);
    check_layout("adamw_", "exp_avg_sqs", exp_avg_sqs[i], parameters[i]);
    check_device("adamw_", "steps", steps[i], parameters[i]);
    STD_TORCH_CHECK(steps[i].numel() == 1 &&
                        (steps[i].scalar_type() == ScalarType::Float || steps[i].scalar_type() == ScalarType::Double),
                    "torchbp::adamw_: steps wants one float32 or float64 number for each parameter");
    all[i].state[0] = exp_avgs[i].mutable_data_ptr();
    all[i].state[1] = exp_avg_sqs[i].mutable_data_ptr();
    all[i].step = steps[i].mutable_data_ptr();
    all[i].wide_step = steps[i].scalar_type() == ScalarType::Double;
  }
  advance(all);
  Cpu::update(all);
}

}  // namespace
}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  m.impl("sgd_", TORCH_BOX(&torchbp::sgd_));
  m.impl("adamw_", TORCH_BOX(&torchbp::adamw_));
}
