// Steps of training a multi-layer perceptron without autograd: forward, softmax cross-entropy, backward, and each weight
// updated tile by tile as its gradient comes out of the product, which never reaches memory.
//
// open makes a trainer of a network's parameters and its optimizer's state, and returns its number; the other
// operations run it. A trainer holds the very tensors of model and optimizer, and looks up where they are at every call.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <memory>
#include <string>

#include "../handles.h"
#include "../ops.h"
#include "backend.h"
#include "gemm.h"
#include "images.h"
#include "network.h"
#include "threads.h"

namespace torchbp {
namespace {

constexpr const char* kOp = "trainer";

// Below this many multiplications a call is over before a team would have come together (70 us).
constexpr double kAlone = 1 << 22;

void check_operand(const char* argument, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_cpu() && t.is_contiguous(), "torchbp::", kOp, ": ", argument,
                  " wants a contiguous CPU tensor of dtype ", dtype == ScalarType::Long ? "int64" : "float32");
}

// A parameter, what the optimizer keeps for it, and the row of hyperparameters that it follows.
struct Trained {
  Tensor value;
  int64_t numel;
  bool is_weight;
  size_t layer;
  int64_t group;  // -1: frozen
  size_t index;   // in what is updated
  std::vector<Tensor> state;
};

class Trainer {
public:
  Trainer(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const std::vector<Tensor>& state,
          const std::string& activation, double parameter, double label_smoothing, const std::string& rule,
          const std::vector<int64_t>& groups, const std::vector<int64_t>& slots)
      : rule_(rule == "adamw" ? Rule::adamw : Rule::sgd) {
    STD_TORCH_CHECK(rule == "sgd" || rule == "adamw", "torchbp::", kOp, ": rule wants sgd or adamw, got ", rule);
    check_mlp(kOp, weights, biases);
    const size_t parameters = weights.size() + biases.size();
    STD_TORCH_CHECK(groups.size() == parameters && slots.size() == parameters, "torchbp::", kOp,
                    ": groups and slots want a number for each weight and bias");
    STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, "torchbp::", kOp,
                    ": label_smoothing wants 0 to 1, got ", label_smoothing);
    const Activation f = activation_of(kOp, activation);
    net_.set_activation(f, parameter);
    net_.layers.resize(weights.size());
    gradients_.resize(weights.size());
    ce_.dtype = ScalarType::Float;
    ce_.label_smoothing = label_smoothing;
    size_t next = 0;
    for (size_t p = 0; p < parameters; ++p) {
      const bool is_weight = p < weights.size();
      const size_t l = p % weights.size();
      const Tensor& t = is_weight ? weights[l] : biases[l];
      check_operand(is_weight ? "weights" : "biases", t, ScalarType::Float);
      Layer& layer = net_.layers[l];
      if (is_weight) {
        STD_TORCH_CHECK(t.dim() == 2 && (l == 0 || t.size(1) == weights[l - 1].size(0)), "torchbp::", kOp,
                        ": weights want matrices (out_features, in_features) that follow on one another");
        layer.in = t.size(1);
        layer.out = t.size(0);
      } else {
        check_shape(kOp, "biases", t, std::vector<int64_t>{layer.out});
      }
      Trained trained{t, t.numel(), is_weight, l, groups[p], updated_.size(), {}};
      if (groups[p] >= 0) updated_.emplace_back();
      groups_ = std::max(groups_, groups[p] + 1);
      STD_TORCH_CHECK(groups[p] < 0          ? slots[p] == 0
                      : rule_ == Rule::adamw ? slots[p] == 3
                                             : slots[p] == 0 || slots[p] == 1,
                      "torchbp::", kOp, ": slots wants 0 or 1 for sgd, 3 for adamw and 0 for what is frozen, got ",
                      slots[p]);
      for (int64_t s = 0; s < slots[p]; ++s) {
        STD_TORCH_CHECK(next < state.size(), "torchbp::", kOp, ": state wants more than ", state.size(), " tensors");
        const Tensor& kept = state[next++];
        if (s < 2 || kept.scalar_type() != ScalarType::Double) check_operand("state", kept, ScalarType::Float);
        STD_TORCH_CHECK(s == 2 ? kept.numel() == 1 : same_shape(kept, t), "torchbp::", kOp,
                        ": state wants tensors like their parameter, and a number of steps");
        trained.state.push_back(kept);
      }
      trained_.push_back(std::move(trained));
    }
    STD_TORCH_CHECK(next == state.size(), "torchbp::", kOp, ": state wants ", next, " tensors, got ", state.size());
  }

  int64_t in_features() const { return net_.layers.front().in; }
  // Numbers in the hyperparameters of one step: a row for each group.
  size_t row() const { return static_cast<size_t>(groups_) * kHyper; }

  // Throws if a row of hyperparameters has a momentum and its group no buffers.
  void check_momentum(const std::vector<double>& hyper) const {
    if (rule_ != Rule::sgd) return;
    for (const Trained& t : trained_) {
      if (t.group < 0 || !t.state.empty()) continue;
      for (size_t at = static_cast<size_t>(t.group) * kHyper; at + kHyper <= hyper.size(); at += row())
        STD_TORCH_CHECK(update_of(rule_, &hyper[at]).momentum == 0, "torchbp::", kOp,
                        ": hyper has a momentum, and state no buffers");
    }
  }

  // Of a step with n examples, about.
  double multiplications(int64_t n) const {
    double sum = 0;
    for (const Layer& layer : net_.layers) sum += static_cast<double>(layer.in * layer.out);
    return 3 * sum * static_cast<double>(n);
  }

  // To be called before the first of some steps with n examples each. batch: whether batch() is wanted.
  void prepare(int64_t n, bool batch = false) {
    for (Trained& t : trained_) {
      Layer& layer = net_.layers[t.layer];
      float* const value = find(t.value, t.numel);
      (t.is_weight ? layer.weight : layer.bias) = value;
      if (t.group < 0) continue;
      Parameter& updated = updated_[t.index];
      for (size_t s = 0; s < std::min<size_t>(t.state.size(), 2); ++s) updated.state[s] = find(t.state[s], t.numel);
      if (t.state.size() > 2) {
        updated.step = t.state[2].mutable_data_ptr();
        updated.wide_step = t.state[2].scalar_type() == ScalarType::Double;
      }
      Gradients& g = gradients_[t.layer];
      (t.is_weight ? g.weight : g.bias) = value;
      (t.is_weight ? g.update_weight : g.update_bias) = &updated.update;
      for (int s = 0; s < 2; ++s)
        (t.is_weight ? g.state_weight : g.state_bias)[s] = static_cast<float*>(updated.state[s]);
    }
    if (scratch_ && n == net_.n && (batch_ || !batch)) return;
    net_.n = n;
    size_t used = 0;
    const auto lay_out = [&](float* base) {
      used = 0;
      const auto take = [&](int64_t numbers) {
        float* const p = base ? base + used : nullptr;
        used += static_cast<size_t>((numbers + 15) / 16 * 16);
        return p;
      };
      for (size_t l = 0; l + 1 < net_.layers.size(); ++l) {
        Layer& layer = net_.layers[l];
        layer.h = take(layer.out * n);
        if (net_.saves_x) layer.z = take(layer.out * n);
      }
      const int64_t logits = n * net_.layers.back().out;
      logits_ = take(logits);
      grad_logits_ = take(logits);
      scratch_ = take(scratch_size(net_));
      batch_ = batch ? take(n * in_features()) : nullptr;
    };
    lay_out(nullptr);
    lay_out(memory_.at_least(used));
    ce_.n = n;
    ce_.classes = net_.layers.back().out;
    ce_.input = logits_;
    ce_.grad_input = grad_logits_;
  }

  float* batch() { return batch_; }

  // Of the last step, before its update.
  Tensor logits() const {
    const Tensor result = torch::stable::empty(std::vector<int64_t>{ce_.n, ce_.classes}, ScalarType::Float,
                                               std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    std::copy_n(logits_, ce_.n * ce_.classes, floats_of(result));
    return result;
  }

  // Runs one step on x [n, in] and its targets; hyper: a row for each group. Returns the loss before it.
  float step(Matrix x, const int64_t* target, const double* hyper) {
    forward(net_, x, {logits_, ce_.classes, 1});
    ce_.target = target;
    float loss, total;
    Cpu::softmax_ce_forward(ce_, Reduction::mean, &loss, &total);  // and the gradient
    if (groups_ == 0) return loss;
    if (!std::equal(hyper, hyper + row(), hyper_.begin(), hyper_.end())) {
      hyper_.assign(hyper, hyper + row());
      for (const Trained& t : trained_)
        if (t.group >= 0) updated_[t.index].update = update_of(rule_, hyper + t.group * kHyper);
    }
    if (rule_ == Rule::adamw) advance(updated_);
    backward(net_, x, {grad_logits_, ce_.classes, 1}, gradients_, {}, scratch_);
    return loss;
  }

private:
  static float* find(const Tensor& t, int64_t numel) {
    STD_TORCH_CHECK(t.numel() == numel && t.is_contiguous() && t.scalar_type() == ScalarType::Float, "torchbp::", kOp,
                    ": a parameter or its state has changed in shape, layout or dtype");
    return floats_of(t);
  }

  Rule rule_;
  Network net_;
  std::vector<Trained> trained_;
  std::vector<Gradients> gradients_;
  std::vector<Parameter> updated_;  // those that are not frozen
  std::vector<double> hyper_;       // that they follow
  int64_t groups_ = 0;
  SoftmaxCE ce_;
  float *logits_ = nullptr, *grad_logits_ = nullptr, *scratch_ = nullptr, *batch_ = nullptr;
  Scratch memory_;
};

Handles<Trainer> trainers(kOp);

int64_t open(std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> state, Text activation,
             double parameter, double label_smoothing, Text rule, std::vector<int64_t> groups,
             std::vector<int64_t> slots) {
  return trainers.open(
      std::make_shared<Trainer>(weights, biases, state, activation, parameter, label_smoothing, rule, groups, slots));
}

// Whether each of the steps has hyperparameters of its own.
bool check_hyper(const Trainer& trainer, const std::vector<double>& hyper, int64_t steps) {
  trainer.check_momentum(hyper);
  if (hyper.size() == trainer.row()) return false;
  STD_TORCH_CHECK(hyper.size() == trainer.row() * static_cast<size_t>(steps), "torchbp::", kOp, ": hyper wants ",
                  trainer.row(), " numbers, or as many for each step, got ", hyper.size());
  return true;
}

// One step on x [n, in], or one on each of xs [steps, n, in]. Returns the losses before the steps.
Tensor steps(int64_t number, const Tensor& xs_, const Tensor& targets_, std::vector<double> hyper) {
  const auto trainer = trainers.at(number);
  const Tensor xs = dense(xs_), targets = dense(targets_);
  check_operand("xs", xs, ScalarType::Float);
  check_operand("targets", targets, ScalarType::Long);
  const bool many = xs.dim() == 3;
  const int64_t in = trainer->in_features();
  STD_TORCH_CHECK((many || xs.dim() == 2) && xs.size(many + 1) == in, "torchbp::", kOp, ": xs wants shape (N, ", in,
                  ") or (steps, N, ", in, "), got ", shape_text(xs));
  const int64_t count = many ? xs.size(0) : 1, n = xs.size(many);
  STD_TORCH_CHECK(targets.dim() == 1 + many && targets.numel() == count * n && targets.size(many) == n,
                  "torchbp::", kOp, ": targets wants the shape of xs without features, got ", shape_text(targets));
  const Tensor losses = empty(many ? std::vector<int64_t>{count} : std::vector<int64_t>{}, ScalarType::Float, xs);
  const bool each = check_hyper(*trainer, hyper, count);
  if (count > 0) trainer->prepare(n);
  const auto* const target = static_cast<const int64_t*>(targets.const_data_ptr());
  const auto run = [&](int64_t s) {
    floats_of(losses)[s] = trainer->step({floats_of(xs) + s * n * in, in, 1}, target + s * n,
                                         hyper.data() + (each ? static_cast<size_t>(s) * trainer->row() : 0));
  };
  if (trainer->multiplications(n) * static_cast<double>(count) < kAlone) {
    for (int64_t s = 0; s < count; ++s) run(s);
  } else {
    on_team_in_rounds(count, run);
  }
  return losses;
}

// One step on each batch of an epoch of images (images.cpp), from the row `begin` on: flattened; the last batch may be
// smaller, or is left out. Returns the losses before the steps.
Tensor epoch(int64_t number, int64_t images, int64_t begin, bool drop_last, std::vector<double> hyper) {
  const auto trainer = trainers.at(number);
  const auto opened = images_of(images);
  STD_TORCH_CHECK(opened->dtype == ScalarType::Float, "torchbp::", kOp, ": images want dtype float32");
  const Batch all = opened->rows(begin, opened->size());
  const int64_t* const target = opened->target() + begin;
  const int64_t features = all.channels * all.height * all.width, batch_size = opened->batch_size;
  STD_TORCH_CHECK(features == trainer->in_features(), "torchbp::", kOp, ": the network wants ", trainer->in_features(),
                  " inputs, and an image has ", features);
  const int64_t n = all.n, count = drop_last ? n / batch_size : (n + batch_size - 1) / batch_size;
  const bool each = check_hyper(*trainer, hyper, count);
  const Tensor losses = empty({count}, ScalarType::Float, opened->images);
  on_team_in_rounds(count, [&](int64_t s) {
    const int64_t first = s * batch_size;
    Batch batch = all.rows(first, std::min(first + batch_size, n));
    if (s == 0 || batch.n != batch_size) trainer->prepare(batch.n, true);
    batch.out = trainer->batch();
    Cpu::batch(batch);
    floats_of(losses)[s] = trainer->step({trainer->batch(), features, 1}, target + first,
                                         hyper.data() + (each ? static_cast<size_t>(s) * trainer->row() : 0));
  });
  return losses;
}

// The logits [n, C] of the last step, before its update.
Tensor logits(int64_t number) { return trainers.at(number)->logits(); }

void close(int64_t number) { trainers.close(number); }

}  // namespace
}  // namespace torchbp

// A library of its own: torch.ops.torchbp has functions of their arguments alone, which can be traced and batched.
STABLE_TORCH_LIBRARY(torchbp_trainer, m) {
  m.def(
      "open(Tensor[] weights, Tensor[] biases, Tensor[] state, str activation, float parameter, "
      "float label_smoothing, str rule, int[] groups, int[] slots) -> int");
  m.def("steps(int trainer, Tensor xs, Tensor targets, float[] hyper) -> Tensor");
  m.def("epoch(int trainer, int images, int begin, bool drop_last, float[] hyper) -> Tensor");
  m.def("logits(int trainer) -> Tensor");
  m.def("close(int trainer) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(torchbp_trainer, CPU, m) {
  m.impl("open", TORCH_BOX(&torchbp::open));
  m.impl("steps", TORCH_BOX(&torchbp::steps));
}
STABLE_TORCH_LIBRARY_IMPL(torchbp_trainer, CompositeExplicitAutograd, m) {
  m.impl("epoch", TORCH_BOX(&torchbp::epoch));
  m.impl("logits", TORCH_BOX(&torchbp::logits));
  m.impl("close", TORCH_BOX(&torchbp::close));
}
