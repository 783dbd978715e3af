// The operations of torchbp.optim: all parameters of an optimizer updated in one call.
#include <torch/csrc/stable/library.h>

#include "backend.h"
#include "state.h"

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

// One step. state: of each parameter in turn what take_state says. groups: of each group in turn the number of its
// parameters and a row of hyperparameters (optim.h). Everything is checked before anything changes.
template <Rule rule>
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
      check_layout(op, "grads", grads[i], t);
      p.n = t.numel();
      p.data = t.mutable_data_ptr();
      p.grad = grads[i].const_data_ptr();
      take_state(op, p, t, state, used);
      all.push_back(p);
    }
  }
  STD_TORCH_CHECK(all.size() == parameters.size(), "torchbp::", op, ": groups wants ", parameters.size(),
                  " parameters in all, got ", all.size());
  check_all_taken(op, state, used);
  if (rule == Rule::adamw) advance(all);
  Cpu::update(all);
}

}  // namespace
}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  using torchbp::Rule;
  m.impl("sgd_", TORCH_BOX(&torchbp::update_<Rule::sgd>));
  m.impl("adamw_", TORCH_BOX(&torchbp::update_<Rule::adamw>));
}
