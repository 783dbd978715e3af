// The update rules of the optimizers, as torch.optim's single-tensor implementations compute them: SGD with momentum,
// and AdamW. One pass over a contiguous run; half types compute in float32 and are rounded once.
//
// Part of level.h: compiled once per SIMD level.
#pragma once

#include "../dtype.h"
#include "../optim.h"

namespace torchbp::TORCHBP_LEVEL {

//   g = grad + weight_decay p        b = momentum b + (1 - dampening) g        p -= lr (nesterov ? g + momentum b : b)
template <class T, bool decays, bool has_momentum, bool nesterov>
void sgd(const Update& u, T* p, const T* grad, T* buffer, int64_t n) {
  using C = Compute<T>;
  const C lr = static_cast<C>(u.lr), weight_decay = static_cast<C>(u.weight_decay), sign = u.maximize ? C(-1) : C(1);
  const C momentum = static_cast<C>(u.momentum), share = static_cast<C>(1 - u.dampening);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const C old = load(p[i]);
    C g = sign * load(grad[i]);
    if constexpr (decays) g += weight_decay * old;  // 0 times an infinite parameter would be nan
    if constexpr (has_momentum) {
      const C b = momentum * load(buffer[i]) + share * g;
      store(buffer + i, b);
      g = nesterov ? g + momentum * b : b;
    }
    store(p + i, old - lr * g);
  }
}

//   p -= lr weight_decay p           m = beta1 m + (1 - beta1) g               v = beta2 v + (1 - beta2) g^2
//   p -= lr (m / correction1) / (sqrt(v / correction2) + eps)
template <class T>
void adamw(const Update& u, T* p, const T* grad, T* exp_avg, T* exp_avg_sq, int64_t n) {
  using C = Compute<T>;
  const C sign = u.maximize ? C(-1) : C(1), keep = static_cast<C>(1 - u.lr * u.weight_decay);
  const C new1 = static_cast<C>(1 - u.beta1), new2 = static_cast<C>(1 - u.beta2), beta2 = static_cast<C>(u.beta2);
  const C size = static_cast<C>(u.lr / u.correction1), eps = static_cast<C>(u.eps);
  const C scale = static_cast<C>(1 / std::sqrt(u.correction2));
  const bool near = new1 < C(0.5);  // torch.lerp starts from the nearer end
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const C g = sign * load(grad[i]), old = load(exp_avg[i]);
    const C m = near ? old + new1 * (g - old) : g - (g - old) * (1 - new1);
    const C v = beta2 * load(exp_avg_sq[i]) + new2 * g * g;
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
    store(p + i, keep * load(p[i]) - size * m / (std::sqrt(v) * scale + eps));
  }
}

// state: the momentum buffer (null without momentum), or exp_avg and exp_avg_sq.
template <class T>
void update(const Update& u, void* parameter, const void* grad_, void* state0, void* state1, int64_t n) {
  T* const p = static_cast<T*>(parameter);
  const T* const grad = static_cast<const T*>(grad_);
  T* const state = static_cast<T*>(state0);
  if (u.rule == Rule::adamw) return adamw(u, p, grad, state, static_cast<T*>(state1), n);
  const bool decays = u.weight_decay != 0;
  if (u.momentum == 0)
    return decays ? sgd<T, true, false, false>(u, p, grad, state, n)
                  : sgd<T, false, false, false>(u, p, grad, state, n);
  if (u.nesterov)
    return decays ? sgd<T, true, true, true>(u, p, grad, state, n) : sgd<T, false, true, true>(u, p, grad, state, n);
  return decays ? sgd<T, true, true, false>(u, p, grad, state, n) : sgd<T, false, true, false>(u, p, grad, state, n);
}

}  // namespace torchbp::TORCHBP_LEVEL
