// Steps of training a multi-layer perceptron without autograd: forward, softmax cross-entropy, backward, and each weight
// updated tile by tile as its gradient comes out of the product, which never reaches memory.
//
// open makes a trainer of a network's parameters and its optimizer's state, and returns its number; the other
// operations run it. A trainer holds the very tensors of model and optimizer, and looks up where they are at every call.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <memory>
#include <string>

#include "../trainer.h"
#include "backend.h"
#include "gemm.h"
#include "images.h"
#include "network.h"
#include "threads.h"

namespace torchbp {
namespace {

// Below this many multiplications a call is over before a team would have come together (70 us).
constexpr double kAlone = 1 << 22;

// Numbers of the copies of a batch, which are to stay in the caches.
constexpr int64_t kCopies = 4 << 20;

class Trainer : public TrainerBase {
public:
  Trainer(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const std::vector<Tensor>& state,
          const std::string& activation, double parameter, double label_smoothing, const std::string& rule,
          const std::vector<int64_t>& groups, const std::vector<int64_t>& slots)
      : TrainerBase(weights, biases, state, activation, label_smoothing, rule, groups, slots) {
    net_.set_activation(activation_, parameter);
    net_.layers.resize(sizes_.size());
    gradients_.resize(sizes_.size());
    for (size_t l = 0; l < sizes_.size(); ++l) {
      net_.layers[l].in = sizes_[l].in;
      net_.layers[l].out = sizes_[l].out;
    }
    ce_.dtype = ScalarType::Float;
    ce_.label_smoothing = label_smoothing;
  }

  // Of a step with n examples, about.
  double multiplications(int64_t n) const {
    double sum = 0;
    for (const Layer& layer : net_.layers) sum += static_cast<double>(layer.in * layer.out);
    return 3 * sum * static_cast<double>(n);
  }

  // To be called before the first of some steps with n examples each. copies: how many batch() is to have room for.
  void prepare(int64_t n, int64_t copies = 0) {
    locate();
    for (const Trained& t : trained_) {
      Layer& layer = net_.layers[t.layer];
      (t.is_weight ? layer.weight : layer.bias) = t.data;
      if (t.group < 0) continue;
      Parameter& updated = updated_[t.index];
      Gradients& g = gradients_[t.layer];
      (t.is_weight ? g.weight : g.bias) = t.data;
      (t.is_weight ? g.update_weight : g.update_bias) = &updated.update;
      for (int s = 0; s < 2; ++s)
        (t.is_weight ? g.state_weight : g.state_bias)[s] = static_cast<float*>(updated.state[s]);
    }
    if (scratch_ && n == net_.n && copies <= copies_) return;
    net_.n = n;
    copies_ = copies;
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
      batch_ = take(copies * n * in_features());
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
    begin_step(hyper);
    backward(net_, x, {grad_logits_, ce_.classes, 1}, gradients_, {}, scratch_);
    return loss;
  }

private:
  Network net_;
  std::vector<Gradients> gradients_;
  SoftmaxCE ce_;
  float *logits_ = nullptr, *grad_logits_ = nullptr, *scratch_ = nullptr, *batch_ = nullptr;
  int64_t copies_ = 0;
  Scratch memory_;
};

Handles<Trainer> trainers(kTrainer);

int64_t open(std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> state, Text activation,
             double parameter, double label_smoothing, Text rule, std::vector<int64_t> groups,
             std::vector<int64_t> slots) {
  return trainers.open(
      std::make_shared<Trainer>(weights, biases, state, activation, parameter, label_smoothing, rule, groups, slots));
}

// One step on x [n, in], or one on each of xs [steps, n, in]; hyper: the rows of all, of each, or none if they are those
// of the step before. Returns the losses before the steps.
Tensor steps(int64_t number, const Tensor& xs_, const Tensor& targets_, std::vector<double> hyper) {
  const auto trainer = trainers.at(number);
  const auto [xs, targets, many, count, n] = trainer->check_batches(xs_, targets_);
  const int64_t in = trainer->in_features();
  const Tensor losses = empty(many ? std::vector<int64_t>{count} : std::vector<int64_t>{}, ScalarType::Float, xs);
  const bool each = trainer->check_hyper(hyper, count);
  if (count > 0) trainer->prepare(n);
  const auto* const target = static_cast<const int64_t*>(targets.const_data_ptr());
  const auto run = [&](int64_t s) {
    floats_of(losses)[s] =
        trainer->step({floats_of(xs) + s * n * in, in, 1}, target + s * n, trainer->rows_of_step(hyper, each, s));
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
  STD_TORCH_CHECK(opened->dtype == ScalarType::Float, "torchbp::", kTrainer, ": images want dtype float32");
  const Batch all = opened->rows(begin, opened->size());
  const int64_t* const target = opened->target() + begin;
  const int64_t features = all.channels * all.height * all.width, batch_size = opened->batch_size;
  STD_TORCH_CHECK(features == trainer->in_features(), "torchbp::", kTrainer, ": the network wants ",
                  trainer->in_features(), " inputs, and an image has ", features);
  const int64_t n = all.n, count = drop_last ? n / batch_size : (n + batch_size - 1) / batch_size;
  const bool each = trainer->check_hyper(hyper, count);
  const Tensor losses = empty({count}, ScalarType::Float, opened->images);
  // A batch for each thread, made by it: each reads all of the batch, twice, and what another core has just written
  // takes longer to read than to make. So an epoch of CIFAR-10 takes 0.97 of the time on two cores with a cache in
  // common, and 0.94 on two without.
  const int64_t threads = thread_count(), most = threads * std::min(batch_size, n) * features <= kCopies ? threads : 1;
  on_team_in_rounds(count, [&](int64_t s) {
    const int64_t first = s * batch_size, copies = std::min(most, thread_count());
    Batch batch = all.rows(first, std::min(first + batch_size, n));
    if (s == 0 || batch.n != batch_size) trainer->prepare(batch.n, most);
    batch.out = trainer->batch();
    const int64_t apart = batch.n * features * static_cast<int64_t>(sizeof(float));
    Cpu::batch(batch, copies, apart);
    floats_of(losses)[s] = trainer->step({trainer->batch(), features, 1, kFloat32, copies, apart}, target + first,
                                         trainer->rows_of_step(hyper, each, s));
  });
  return losses;
}

// The logits [n, C] of the last step, before its update.
Tensor logits(int64_t number, const Tensor&) { return trainers.at(number)->logits(); }

void close(int64_t number, const Tensor&) { trainers.close(number); }

}  // namespace
}  // namespace torchbp

// A library of its own: torch.ops.torchbp has functions of their arguments alone, which can be traced and batched.
// `like` is any tensor on the trainer's device. What the CPU has not is told in cuda/train.cu.
STABLE_TORCH_LIBRARY(torchbp_trainer, m) {
  m.def(
      "open(Tensor[] weights, Tensor[] biases, Tensor[] state, str activation, float parameter, "
      "float label_smoothing, str rule, int[] groups, int[] slots) -> int");
  m.def("steps(int trainer, Tensor xs, Tensor targets, float[] hyper) -> Tensor");
  m.def("again(int trainer, Tensor x, Tensor target) -> Tensor");
  m.def("epoch(int trainer, int images, int begin, bool drop_last, float[] hyper) -> Tensor");
  m.def("fits(int trainer, int n, Tensor like) -> bool");
  m.def("begin_step(int trainer, float[] hyper, Tensor like) -> int");
  m.def("update(int trainer, Tensor[] grads) -> ()");
  m.def("logits(int trainer, Tensor like) -> Tensor");
  m.def("close(int trainer, Tensor like) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(torchbp_trainer, CPU, m) {
  m.impl("open", TORCH_BOX(&torchbp::open));
  m.impl("steps", TORCH_BOX(&torchbp::steps));
  m.impl("again", TORCH_BOX(&torchbp::again<&torchbp::steps>));
  m.impl("logits", TORCH_BOX(&torchbp::logits));
  m.impl("close", TORCH_BOX(&torchbp::close));
}
STABLE_TORCH_LIBRARY_IMPL(torchbp_trainer, CompositeExplicitAutograd, m) {
  m.impl("epoch", TORCH_BOX(&torchbp::epoch));
}
