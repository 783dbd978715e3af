// The update rules of the optimizers, as torch.optim's single-tensor implementations compute them: SGD with momentum,
// and AdamW. Half types compute in float32 and are rounded once.
//
// Like math.h, one copy for each SIMD level and one for CUDA.
#pragma once

#include "dtype.h"
#include "optim.h"

namespace torchbp::TORCHBP_LEVEL {

//   g = grad + weight_decay p        b = momentum b + (1 - dampening) g        p -= lr (nesterov ? g + momentum b : b)
template <class C, bool decays, bool has_momentum, bool nesterov>
struct Sgd {
  static constexpr int states = has_momentum;
  C lr, weight_decay, sign, momentum, share;

  explicit Sgd(const Update& u)
      : lr(static_cast<C>(u.lr)),
        weight_decay(static_cast<C>(u.weight_decay)),
        sign(u.maximize ? C(-1) : C(1)),
        momentum(static_cast<C>(u.momentum)),
        share(static_cast<C>(1 - u.dampening)) {}

  // A number or a vector of them.
  template <class V>
  TORCHBP_INLINE V moved(V old, V direction) const {
    return old - lr * direction;
  }

  // Element i; there is a buffer if there is momentum.
  template <class T>
  TORCHBP_INLINE void operator()(T* p, const T* grad, T* buffer, T*, int64_t i) const {
    const C old = load(p[i]);
    C g = sign * load(grad[i]);
    if constexpr (decays) g += weight_decay * old;  // 0 times an infinite parameter would be nan
    if constexpr (has_momentum) {
      const C b = momentum * load(buffer[i]) + share * g;
      store(buffer + i, b);
      g = nesterov ? g + momentum * b : b;
    }
    store(p + i, moved(old, g));
  }
};

//   p -= lr weight_decay p           m = beta1 m + (1 - beta1) g               v = beta2 v + (1 - beta2) g^2
//   p -= lr (m / correction1) / (sqrt(v / correction2) + eps)
template <class C>
struct AdamW {
  static constexpr int states = 2;
  C sign, keep, new1, new2, beta2, size, eps, scale;
  bool near;  // torch.lerp starts from the nearer end

  explicit AdamW(const Update& u)
      : sign(u.maximize ? C(-1) : C(1)),
        keep(static_cast<C>(1 - u.lr * u.weight_decay)),
        new1(static_cast<C>(1 - u.beta1)),
        new2(static_cast<C>(1 - u.beta2)),
        beta2(static_cast<C>(u.beta2)),
        size(static_cast<C>(u.lr / u.correction1)),
        eps(static_cast<C>(u.eps)),
        scale(static_cast<C>(1 / std::sqrt(u.correction2))),
        near(new1 < C(0.5)) {}

  // Element i, with the averages of its gradient and of the square of that.
  template <class T>
  TORCHBP_INLINE void operator()(T* p, const T* grad, T* exp_avg, T* exp_avg_sq, int64_t i) const {
    const C g = sign * load(grad[i]), old = load(exp_avg[i]);
    const C m = near ? old + new1 * (g - old) : g - (g - old) * (1 - new1);
    const C v = beta2 * load(exp_avg_sq[i]) + new2 * g * g;
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
    store(p + i, keep * load(p[i]) - size * m / (std::sqrt(v) * scale + eps));
  }
};

// Gradient descent and nothing else: a product whose result is a gradient does it while that is in registers.
using PlainSgd = Sgd<float, false, false, false>;

inline bool is_plain(const Update& u) {
  return u.rule == Rule::sgd && u.momentum == 0 && u.weight_decay == 0 && !u.maximize;
}

// f(rule) with the rule that an update follows: what it leaves out is known where f is compiled.
template <class C, class F>
void with_rule(const Update& u, const F& f) {
  if (u.rule == Rule::adamw) return f(AdamW<C>(u));
  const bool decays = u.weight_decay != 0;
  if (u.momentum == 0) return decays ? f(Sgd<C, true, false, false>(u)) : f(Sgd<C, false, false, false>(u));
  if (u.nesterov) return decays ? f(Sgd<C, true, true, true>(u)) : f(Sgd<C, false, true, true>(u));
  return decays ? f(Sgd<C, true, true, false>(u)) : f(Sgd<C, false, true, false>(u));
}

}  // namespace torchbp::TORCHBP_LEVEL
