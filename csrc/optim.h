// What an optimizer does to a parameter: the hyperparameters of one step, and the memory that it works on.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace torchbp {

enum class Rule { sgd, adamw };

// One step of torch.optim.SGD or AdamW, in their names. update.h has the formulas.
struct Update {
  Rule rule = Rule::sgd;
  double lr = 0, weight_decay = 0;
  bool maximize = false;
  // sgd
  double momentum = 0, dampening = 0;
  bool nesterov = false;
  // adamw
  double beta1 = 0, beta2 = 0, eps = 0;
  double correction1 = 1, correction2 = 1;  // 1 - beta^step: what the moments, which began at 0, are divided by

  // The step that an AdamW parameter is at, counted from 1.
  void at_step(double step) {
    correction1 = 1 - std::pow(beta1, step);
    correction2 = 1 - std::pow(beta2, step);
  }

  bool operator==(const Update&) const = default;
};

// A group's hyperparameters as operations take them: a row of this many float64.
//
//   sgd:    lr, momentum, dampening, weight_decay, nesterov, maximize
//   adamw:  lr, beta1, beta2, eps, weight_decay, maximize
constexpr int kHyper = 6;

inline Update update_of(Rule rule, const double* row) {
  Update u;
  u.rule = rule;
  u.lr = row[0];
  if (rule == Rule::sgd) {
    u.momentum = row[1];
    u.dampening = row[2];
    u.weight_decay = row[3];
    u.nesterov = row[4] != 0;
  } else {
    u.beta1 = row[1];
    u.beta2 = row[2];
    u.eps = row[3];
    u.weight_decay = row[4];
  }
  u.maximize = row[5] != 0;
  return u;
}

// n elements, one after the other, of a parameter, its gradient and what the optimizer keeps for it: the momentum
// buffer, if there is momentum, or exp_avg, exp_avg_sq and the count of steps.
struct Parameter {
  Update update;
  torch::headeronly::ScalarType dtype;
  int32_t device = -1;  // its index, as in cuda:0
  int64_t n = 0, bytes = 0;
  void* data = nullptr;
  const void* grad = nullptr;
  void* state[2] = {nullptr, nullptr};
  void* step = nullptr;  // a float32 or float64 number, as torch.optim keeps it
  bool wide_step = false;
};

// Whether what is written for one parameter is written for another one too, or for the same one given twice.
inline bool overlap(const std::vector<Parameter>& parameters) {
  std::vector<std::pair<const char*, const char*>> spans;
  for (const Parameter& p : parameters)
    for (const void* data : {static_cast<const void*>(p.data), static_cast<const void*>(p.state[0]),
                             static_cast<const void*>(p.state[1])}) {
      const char* const begin = static_cast<const char*>(data);
      if (begin) spans.emplace_back(begin, begin + p.bytes);
    }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    if (spans[i].first < spans[i - 1].second) return true;
  return false;
}

// Counts the step that AdamW is about to do.
inline void advance(std::vector<Parameter>& parameters) {
  double last = -1;
  const Update* before = nullptr;
  for (Parameter& p : parameters) {
    const double step = p.wide_step ? *static_cast<double*>(p.step) += 1 : *static_cast<float*>(p.step) += 1;
    Update& u = p.update;
    if (before && step == last && before->beta1 == u.beta1 && before->beta2 == u.beta2) {  // two powers saved
      u.correction1 = before->correction1;
      u.correction2 = before->correction2;
    } else {
      u.at_step(step);
    }
    before = &u;
    last = step;
  }
}

}  // namespace torchbp
