// train_mlp: training steps of an MLP as one operation. Forward, softmax cross-entropy, backward and update of each step
// run one after the other on the batches that are given, in place, without autograd.
#include "../ops.h"
#include "backend.h"
#include "state.h"

namespace torchbp {
namespace {

// While it lives, PyTorch's own operations record nothing.
struct NoGrad {
  const bool before = aoti_torch_grad_mode_is_enabled();
  NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before); }
};

// The parameters that are trained, with the memory of their state.
struct Trained {
  std::vector<Parameter> parameters;
  std::vector<int64_t> group;  // of each, its row of hyperparameters
  std::vector<size_t> place;   // of each, where it stands among the weights and, after them, the biases

  Trained(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const std::vector<Tensor>& state,
          Rule rule, const std::vector<int64_t>& groups, const std::vector<double>& hyper) {
    const size_t count = weights.size() + biases.size();
    STD_TORCH_CHECK(groups.size() == count, "torchbp::train_mlp: groups wants ", count, " of them, got ",
                    groups.size());
    size_t used = 0;
    for (size_t i = 0; i < count; ++i) {
      const Tensor& t = i < weights.size() ? weights[i] : biases[i - weights.size()];
      STD_TORCH_CHECK(t.is_contiguous(), "torchbp::train_mlp: weights and biases wants contiguous tensors");
      if (groups[i] < 0) continue;
      STD_TORCH_CHECK((groups[i] + 1) * kHyper <= static_cast<int64_t>(hyper.size()),
                      "torchbp::train_mlp: hyper wants ", kHyper, " numbers for each group, got ", hyper.size());
      Parameter p;
      p.dtype = t.scalar_type();
      p.n = t.numel();
      p.data = t.mutable_data_ptr();
      p.update = update_of(rule, &hyper[groups[i] * kHyper]);
      take_state("train_mlp", p, t, state, used);
      parameters.push_back(p);
      group.push_back(groups[i]);
      place.push_back(i);
    }
    check_all_taken("train_mlp", state, used);
  }
};

// xs [B, D] and targets [B], or [steps, B, D] and [steps, B]; returns the loss of each step before its update, of shape
// () or [steps]. Per parameter, weights first: its group (a row of hyper, or -1 where it is not trained), and in state
// what take_state says. hyper: [1 or steps][groups][kHyper].
Tensor train_mlp(const Tensor& xs, const Tensor& targets, const std::vector<Tensor>& weights,
                 const std::vector<Tensor>& biases, const std::vector<Tensor>& state, std::string activation,
                 double parameter, double label_smoothing, std::string rule_name, const std::vector<int64_t>& groups,
                 const std::vector<double>& hyper) {
  const char* op = "train_mlp";
  STD_TORCH_CHECK(xs.scalar_type() == ScalarType::Float, "torchbp::", op, ": xs wants dtype float32");
  STD_TORCH_CHECK(xs.dim() == 2 || xs.dim() == 3, "torchbp::", op, ": xs wants shape (B, D) or (steps, B, D), got ",
                  shape_text(xs));
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long, "torchbp::", op, ": targets wants dtype int64");
  check_device(op, "targets", targets, xs);
  const bool many = xs.dim() == 3;
  const int64_t steps = many ? xs.size(0) : 1;
  check_shape(op, "targets", targets,
              many ? std::vector<int64_t>{steps, xs.size(1)} : std::vector<int64_t>{xs.size(0)});
  if (steps == 0) return empty({0}, xs.scalar_type(), xs);
  check_mlp(op, xs, weights, biases);
  for (const Tensor& t : weights) check_like(op, "weights", t, xs);
  for (const Tensor& t : biases) check_like(op, "biases", t, xs);
  STD_TORCH_CHECK(rule_name == "sgd" || rule_name == "adamw", "torchbp::", op, ": rule wants sgd or adamw, got ",
                  rule_name);
  const Rule rule = rule_name == "sgd" ? Rule::sgd : Rule::adamw;
  Trained trained(weights, biases, state, rule, groups, hyper);
  const int64_t rows = groups.empty() ? 0 : std::max<int64_t>(0, *std::max_element(groups.begin(), groups.end()) + 1);
  const int64_t row = rows * kHyper, given = static_cast<int64_t>(hyper.size());
  STD_TORCH_CHECK(given == row || given == row * steps, "torchbp::", op, ": hyper wants ", row, " numbers, or ",
                  row * steps, " for the steps, got ", given);

  const auto hyper_of = [&](int64_t step, int64_t group) {
    return &hyper[(given == row ? 0 : step * row) + group * kHyper];
  };
  if (rule == Rule::sgd && given != row)
    for (int64_t k = 1; k < steps; ++k)
      for (int64_t g = 0; g < rows; ++g)
        STD_TORCH_CHECK((hyper_of(k, g)[1] != 0) == (hyper_of(0, g)[1] != 0), "torchbp::", op,
                        ": hyper wants a momentum in every step of a group, or in none");

  const NoGrad no_grad;
  std::vector<int64_t> need_weights(weights.size()), need_biases(biases.size());
  for (const size_t i : trained.place) (i < weights.size() ? need_weights[i] : need_biases[i - weights.size()]) = 1;
  const Tensor one = torch::stable::fill_(empty({}, xs.scalar_type(), xs), 1);
  const Tensor losses = empty(many ? std::vector<int64_t>{steps} : std::vector<int64_t>{}, xs.scalar_type(), xs);
  for (int64_t k = 0; k < steps; ++k) {
    const Tensor x = many ? torch::stable::select(xs, 0, k) : xs;
    const Tensor target = many ? torch::stable::select(targets, 0, k) : targets;
    std::vector<Tensor> saved = mlp<Cpu>(x, weights, biases, activation, parameter);
    const Tensor logits = saved[0];
    saved.erase(saved.begin());
    const int64_t mean = static_cast<int64_t>(Reduction::mean);
    const auto [loss, lse, total] = softmax_ce<Cpu>(logits, target, std::nullopt, -100, mean, label_smoothing);
    static_cast<float*>(losses.mutable_data_ptr())[k] = *static_cast<const float*>(loss.const_data_ptr());
    const Tensor dlogits = std::get<0>(softmax_ce_backward<Cpu>(one, logits, target, std::nullopt, lse, total, -100,
                                                                mean, label_smoothing, true, false));
    const std::vector<Tensor> grads =
        mlp_backward<Cpu>(dlogits, x, weights, saved, activation, parameter, false, need_weights, need_biases);
    std::vector<Tensor> kept;  // the gradients, while the update reads them
    for (size_t i = 0; i < trained.parameters.size(); ++i) {
      Parameter& p = trained.parameters[i];
      p.update = update_of(rule, hyper_of(k, trained.group[i]));
      kept.push_back(dense(grads[1 + trained.place[i]]));
      p.grad = kept.back().const_data_ptr();
    }
    if (rule == Rule::adamw) advance(trained.parameters);
    Cpu::update(trained.parameters);
  }
  return losses;
}

}  // namespace
}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) { m.impl("train_mlp", TORCH_BOX(&torchbp::train_mlp)); }
