// What a trainer of a multi-layer perceptron rests on, on every device: the very tensors of a model and its optimizer,
// which are looked up at every call, and the checks of what its operations are given.
//
// cpu/train.cpp and cuda/train.cu derive their trainers from it. Their operations are those of torch.ops.torchbp_trainer.
#pragma once

#include <string>

#include "activation.h"
#include "check.h"
#include "handles.h"
#include "ops.h"
#include "optim.h"

namespace torchbp {

constexpr const char* kTrainer = "trainer";

// A parameter, what the optimizer keeps for it, and the row of hyperparameters that it follows.
struct Trained {
  Tensor value;
  int64_t numel;
  bool is_weight;
  size_t layer;
  int64_t group;  // -1: frozen
  size_t index;   // in what is updated
  std::vector<Tensor> state;
  float* data = nullptr;  // where the value is now
};

// Batches that were checked: xs [count, n, in] and targets [count, n], contiguous.
struct Batches {
  Tensor xs, targets;
  bool many;  // whether they were given as such
  int64_t count, n;
};

class TrainerBase {
public:
  TrainerBase(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const std::vector<Tensor>& state,
              const std::string& activation, double label_smoothing, const std::string& rule,
              const std::vector<int64_t>& groups, const std::vector<int64_t>& slots)
      : rule_(rule == "adamw" ? Rule::adamw : Rule::sgd), activation_(activation_of(kTrainer, activation)) {
    STD_TORCH_CHECK(rule == "sgd" || rule == "adamw", "torchbp::", kTrainer, ": rule wants sgd or adamw, got ", rule);
    check_mlp(kTrainer, weights, biases);
    const size_t parameters = weights.size() + biases.size();
    STD_TORCH_CHECK(groups.size() == parameters && slots.size() == parameters, "torchbp::", kTrainer,
                    ": groups and slots want a number for each weight and bias");
    STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, "torchbp::", kTrainer,
                    ": label_smoothing wants 0 to 1, got ", label_smoothing);
    sizes_.resize(weights.size());
    first_ = weights[0];
    device_ = first_.device();
    size_t next = 0;
    for (size_t p = 0; p < parameters; ++p) {
      const bool is_weight = p < weights.size();
      const size_t l = p % weights.size();
      const Tensor& t = is_weight ? weights[l] : biases[l];
      check_operand(is_weight ? "weights" : "biases", t, ScalarType::Float);
      if (is_weight) {
        STD_TORCH_CHECK(t.dim() == 2 && (l == 0 || t.size(1) == weights[l - 1].size(0)), "torchbp::", kTrainer,
                        ": weights want matrices (out_features, in_features) that follow on one another");
        sizes_[l] = {t.size(1), t.size(0)};
      } else {
        check_shape(kTrainer, "biases", t, std::vector<int64_t>{sizes_[l].out});
      }
      Trained trained{t, t.numel(), is_weight, l, groups[p], updated_.size(), {}};
      if (groups[p] >= 0) updated_.emplace_back();
      groups_ = std::max(groups_, groups[p] + 1);
      STD_TORCH_CHECK(groups[p] < 0          ? slots[p] == 0
                      : rule_ == Rule::adamw ? slots[p] == 3
                                             : slots[p] == 0 || slots[p] == 1,
                      "torchbp::", kTrainer, ": slots wants 0 or 1 for sgd, 3 for adamw and 0 for what is frozen, got ",
                      slots[p]);
      for (int64_t s = 0; s < slots[p]; ++s) {
        STD_TORCH_CHECK(next < state.size(), "torchbp::", kTrainer, ": state wants more than ", state.size(),
                        " tensors");
        const Tensor& kept = state[next++];
        if (s < 2) check_operand("state", kept, ScalarType::Float);
        STD_TORCH_CHECK(s < 2 || (kept.is_cpu() && (kept.scalar_type() == ScalarType::Float ||
                                                    kept.scalar_type() == ScalarType::Double)),
                        "torchbp::", kTrainer, ": state wants a float32 or float64 number of steps, on the CPU");
        STD_TORCH_CHECK(s == 2 ? kept.numel() == 1 : same_shape(kept, t), "torchbp::", kTrainer,
                        ": state wants tensors like their parameter, and a number of steps");
        trained.state.push_back(kept);
      }
      trained_.push_back(std::move(trained));
    }
    STD_TORCH_CHECK(next == state.size(), "torchbp::", kTrainer, ": state wants ", next, " tensors, got ",
                    state.size());
  }

  int64_t in_features() const { return sizes_.front().in; }
  // Numbers in the hyperparameters of one step: a row for each group.
  size_t row() const { return static_cast<size_t>(groups_) * kHyper; }

  // Throws if hyperparameters of some steps are not what is wanted, as where a row has a momentum and its group no
  // buffers. Returns whether each of the steps has its own. None at all are those of the step before.
  bool check_hyper(const std::vector<double>& hyper, int64_t steps) const {
    if (hyper.empty() && !hyper_.empty()) return false;
    if (rule_ == Rule::sgd)
      for (const Trained& t : trained_) {
        if (t.group < 0 || !t.state.empty()) continue;
        for (size_t at = static_cast<size_t>(t.group) * kHyper; at + kHyper <= hyper.size(); at += row())
          STD_TORCH_CHECK(update_of(rule_, &hyper[at]).momentum == 0, "torchbp::", kTrainer,
                          ": hyper has a momentum, and state no buffers");
      }
    if (hyper.size() == row()) return false;
    STD_TORCH_CHECK(hyper.size() == row() * static_cast<size_t>(steps), "torchbp::", kTrainer, ": hyper wants ", row(),
                    " numbers, or as many for each step, got ", hyper.size());
    return true;
  }

  // The rows that step s follows, of hyperparameters that were checked.
  const double* rows_of_step(const std::vector<double>& hyper, bool each, int64_t s) const {
    return hyper.empty() ? hyper_.data() : hyper.data() + (each ? static_cast<size_t>(s) * row() : 0);
  }

  // x [n, in] and its targets, or xs [steps, n, in] and theirs.
  Batches check_batches(const Tensor& xs_, const Tensor& targets_) const {
    const Tensor xs = dense(xs_), targets = dense(targets_);
    check_operand("xs", xs, ScalarType::Float);
    check_operand("targets", targets, ScalarType::Long);
    const bool many = xs.dim() == 3;
    const int64_t in = in_features();
    STD_TORCH_CHECK((many || xs.dim() == 2) && xs.size(many + 1) == in, "torchbp::", kTrainer, ": xs wants shape (N, ",
                    in, ") or (steps, N, ", in, "), got ", shape_text(xs));
    const int64_t count = many ? xs.size(0) : 1, n = xs.size(many);
    STD_TORCH_CHECK(targets.dim() == 1 + many && targets.numel() == count * n && targets.size(many) == n,
                    "torchbp::", kTrainer, ": targets wants the shape of xs without features, got ",
                    shape_text(targets));
    return {xs, targets, many, count, n};
  }

protected:
  struct Size {
    int64_t in, out;
  };

  void check_operand(const char* argument, const Tensor& t, ScalarType dtype) const {
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.device() == first_.device() && t.is_contiguous(),
                    "torchbp::", kTrainer, ": ", argument, " wants a contiguous tensor of dtype ",
                    dtype == ScalarType::Long ? "int64" : "float32", " on the device of the weights");
  }

  // Looks up where parameters and state are.
  void locate() {
    for (Trained& t : trained_) {
      t.data = find(t.value, t.numel);
      if (t.group < 0) continue;
      Parameter& p = updated_[t.index];
      p.dtype = ScalarType::Float;
      p.device = device_.index();
      p.n = t.numel;
      p.bytes = t.numel * static_cast<int64_t>(sizeof(float));
      p.data = t.data;
      for (size_t s = 0; s < std::min<size_t>(t.state.size(), 2); ++s) p.state[s] = find(t.state[s], t.numel);
      if (t.state.size() > 2) {
        STD_TORCH_CHECK(t.state[2].is_cpu(), "torchbp::", kTrainer, ": state wants the number of steps on the CPU");
        p.step = t.state[2].mutable_data_ptr();
        p.wide_step = t.state[2].scalar_type() == ScalarType::Double;
      }
    }
  }

  // Sets what becomes of each parameter in the next step, which counts from here on; hyper: a row for each group.
  void begin_step(const double* hyper) {
    if (!std::equal(hyper, hyper + row(), hyper_.begin(), hyper_.end())) {
      hyper_.assign(hyper, hyper + row());
      for (const Trained& t : trained_)
        if (t.group >= 0) updated_[t.index].update = update_of(rule_, hyper + t.group * kHyper);
    }
    if (rule_ == Rule::adamw) advance(updated_);
  }

  Rule rule_;
  Activation activation_;
  Tensor first_;  // of the weights
  torch::stable::Device device_{torch::headeronly::DeviceType::CPU};
  std::vector<Size> sizes_;
  std::vector<Trained> trained_;
  std::vector<Parameter> updated_;  // those that are not frozen
  std::vector<double> hyper_;       // that they follow
  int64_t groups_ = 0;

private:
  float* find(const Tensor& t, int64_t numel) const {
    STD_TORCH_CHECK(t.numel() == numel && t.is_contiguous() && t.scalar_type() == ScalarType::Float,
                    "torchbp::", kTrainer, ": a parameter or its state has changed in shape, layout or dtype");
    STD_TORCH_CHECK(t.device() == device_, "torchbp::", kTrainer, ": a parameter or its state has changed its device");
    return floats_of(t);
  }
};

// One more step on x [n, in], with the hyperparameters of the step before, by a device's `steps`: to hand over a list of
// none, and to ask x in Python how many dimensions it has, takes a hundredth of a small step.
template <Tensor (*steps)(int64_t, const Tensor&, const Tensor&, std::vector<double>)>
Tensor again(int64_t number, const Tensor& x, const Tensor& target) {
  STD_TORCH_CHECK(x.dim() == 2, "torchbp::", kTrainer, ": x wants shape (N, D), got ", shape_text(x));
  return steps(number, x, target, {});
}

}  // namespace torchbp
