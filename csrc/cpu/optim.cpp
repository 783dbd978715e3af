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

bool same_layout(const Tensor& a, const Tensor& b) {
  if (!same_shape(a, b)) return false;
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

void check_layout(const char* op, const char* argument, const Tensor& t, const Tensor& parameter) {
  check_like(op, argument, t, parameter);
  STD_TORCH_CHECK(same_layout(t, parameter), "torchbp::", op, ": ", argument,
                  " wants the shape and the strides of its ", "parameter, ", shape_text(parameter), ", got ",
                  shape_text(t));
}

void check_count(const char* op, const char* argument, size_t got, size_t wanted) {
  STD_TORCH_CHECK(got == wanted, "torchbp::", op, ": ", argument, " wants ", wanted, " of them, got ", got);
}

// The parameters with their gradients and updates; their state is left to be filled in. Nothing is changed.
std::vector<Parameter> describe(const char* op, Rule rule, const std::vector<Tensor>& parameters,
                                const std::vector<Tensor>& grads, const std::vector<int64_t>& counts,
                                const std::vector<double>& hyper) {
  check_count(op, "grads", grads.size(), parameters.size());
  check_count(op, "hyper", hyper.size(), counts.size() * kHyper);
  std::vector<Parameter> result;
  result.reserve(parameters.size());
  for (size_t group = 0; group < counts.size(); ++group) {
    const Update update = update_of(rule, &hyper[group * kHyper]);
    for (int64_t k = 0; k < counts[group]; ++k) {
      const size_t i = result.size();
      STD_TORCH_CHECK(i < parameters.size(), "torchbp::", op, ": counts adds up to more than the ", parameters.size(),
                      " parameters");
      const Tensor& t = parameters[i];
      check_floating(op, "parameters", t);
      STD_TORCH_CHECK(is_dense(t), "torchbp::", op, ": parameters wants tensors without gaps or overlaps in memory");
      check_layout(op, "grads", grads[i], t);
      Parameter p;
      p.update = update;
      p.dtype = t.scalar_type();
      p.n = t.numel();
      p.data = t.mutable_data_ptr();
      p.grad = grads[i].const_data_ptr();
      result.push_back(p);
    }
  }
  check_count(op, "counts", result.size(), parameters.size());
  return result;
}

// momentum_buffers: of the parameters of those groups that have momentum.
void sgd_(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
          const std::vector<Tensor>& momentum_buffers, const std::vector<int64_t>& counts,
          const std::vector<double>& hyper) {
  std::vector<Parameter> all = describe("sgd_", Rule::sgd, parameters, grads, counts, hyper);
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
            const std::vector<Tensor>& steps, const std::vector<int64_t>& counts, const std::vector<double>& hyper) {
  std::vector<Parameter> all = describe("adamw_", Rule::adamw, parameters, grads, counts, hyper);
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
