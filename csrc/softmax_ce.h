// Softmax cross-entropy of one row, written once: a row belongs to one thread on the CPU, and to a group of them on CUDA.
//
// With p = softmax(x), lse = log sum exp(x), w the class weights, s the label smoothing, C classes and q the target
// distribution (q = (1 - s) onehot(t) + s / C for a class index t, (1 - s) q + s / C for probabilities):
//
//   loss = sum_c w_c q_c (lse - x_c)        dx_c = dloss (p_c sum_k w_k q_k - w_c q_c)
//   dq_c = dloss (1 - s) w_c (lse - x_c)
//
// The one-hot part of a class index needs no pass over the row: it is added where t is known.
#pragma once

#include "dtype.h"
#include "kernels.h"

namespace torchbp::TORCHBP_LEVEL {

// A Group is the threads of one row. Each thread works on the columns rank, rank + size, ...; sum_of(n, term) adds
// term(0), ..., term(n - 1) between them, and every one of them receives the result.

template <class T>
struct Row {
  using C = Compute<T>;
  const SoftmaxCE& a;
  const T* x;
  const T* q;
  const T* weight;
  int64_t i, target;
  C keep;         // 1 - s
  C smooth_each;  // s / C

  TORCHBP_INLINE Row(const SoftmaxCE& a, int64_t i) : Row(a, i, static_cast<const T*>(a.input) + i * a.classes) {}

  // Row i, of which x is a copy.
  TORCHBP_INLINE Row(const SoftmaxCE& a, int64_t i, const T* x)
      : a(a),
        x(x),
        q(static_cast<const T*>(a.probabilities) + i * a.classes),
        weight(static_cast<const T*>(a.weight)),
        i(i),
        target(a.soft ? -1 : a.target[i]),
        keep(static_cast<C>(1 - a.label_smoothing)),
        smooth_each(a.label_smoothing == 0 ? C(0)
                                           : static_cast<C>(a.label_smoothing / static_cast<double>(a.classes))) {}

  TORCHBP_INLINE bool ignored() const { return !a.soft && target == a.ignore_index; }
  TORCHBP_INLINE bool in_range() const { return a.soft || (target >= 0 && target < a.classes); }
  // Whether q has a part besides the one-hot one.
  TORCHBP_INLINE bool has_soft() const { return a.soft || a.label_smoothing != 0; }
  TORCHBP_INLINE C w(int64_t c) const { return weight ? load(weight[c]) : C(1); }
  // What a mean counts of a row that is neither ignored nor out of range. Over no classes it is 0 / 0, as in PyTorch.
  TORCHBP_INLINE C counts() const { return a.classes == 0 ? C(0) : a.soft ? C(1) : w(target); }
  TORCHBP_INLINE C soft(int64_t c) const { return a.soft ? keep * load(q[c]) + smooth_each : smooth_each; }

  // What a row that is neither ignored nor out of range loses, with lse = shift + log_sum: the shift is an x itself, so
  // that no digit of a difference of large x is lost. All threads of the group call this.
  template <class Group>
  TORCHBP_INLINE C loss(const Group& group, C shift, C log_sum) const {
    const auto below = [&](int64_t c) { return (shift - load(x[c])) + log_sum; };
    C lost = 0;
    if (has_soft()) {
      lost = static_cast<C>(group.sum_of(a.classes, [&](int64_t c) { return w(c) * soft(c) * below(c); }));
    }
    if (!a.soft) lost += keep * w(target) * below(target);
    return lost;
  }

  // dloss, divided by what a mean was divided by.
  TORCHBP_INLINE C upstream() const { return upstream(*static_cast<const C*>(a.total)); }
  TORCHBP_INLINE C upstream(C total) const {
    const C dloss = a.grad ? load(static_cast<const T*>(a.grad)[i * a.grad_stride]) : C(1);
    return dloss / total;
  }
  // w q where the target is, without what smoothing puts there.
  TORCHBP_INLINE C onehot() const { return a.soft ? C(0) : keep * w(target); }
  // The sum of w q. All threads of the group call this.
  template <class Group>
  TORCHBP_INLINE C mass(const Group& group) const {
    if (!has_soft()) return onehot();
    if (!a.soft && !weight) return static_cast<C>(a.label_smoothing) + keep;
    return static_cast<C>(group.sum_of(a.classes, [&](int64_t c) { return w(c) * soft(c); })) + onehot();
  }

  // Writes the gradient of the logits, given the upstream one, to dx, which may be x, with p = exp(x - shift) / sum: not
  // exp(x - lse), as lse has lost the digits of log(sum) where x is large. All threads of the group call this.
  template <class Group>
  TORCHBP_INLINE void backward(const Group& group, C g, C shift, C sum, T* dx) const {
    if (ignored() || !in_range()) {
      for (int64_t c = group.rank; c < a.classes; c += group.size) store(dx + c, C(0));
      return;
    }
    const C hot = g * onehot(), scale = g * mass(group) / sum;
    const auto at_target = [&](int64_t c) { return c == target ? hot : C(0); };
    if (has_soft())
      for (int64_t c = group.rank; c < a.classes; c += group.size)
        store(dx + c, scale * exp(load(x[c]) - shift) - g * (w(c) * soft(c)) - at_target(c));
    else
      for (int64_t c = group.rank; c < a.classes; c += group.size)
        store(dx + c, scale * exp(load(x[c]) - shift) - at_target(c));
  }

  // Writes the gradient of class probabilities to dq, which may be x. All threads of the group call this.
  template <class Group>
  TORCHBP_INLINE void backward_probabilities(const Group& group, C lse, T* dq) const {
    const C g = upstream();
    for (int64_t c = group.rank; c < a.classes; c += group.size) store(dq + c, g * keep * w(c) * (lse - load(x[c])));
  }
};

}  // namespace torchbp::TORCHBP_LEVEL
