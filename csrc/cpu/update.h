// An optimizer's rule (../update.h) over contiguous runs, for the level at hand.
#pragma once

#include "../update.h"

namespace torchbp::TORCHBP_LEVEL {

// state: the momentum buffer (null without momentum), or exp_avg and exp_avg_sq.
template <class T>
void update(const Update& u, void* parameter, const void* grad_, void* state0_, void* state1_, int64_t n) {
  T* const p = static_cast<T*>(parameter);
  const T* const grad = static_cast<const T*>(grad_);
  T *const state0 = static_cast<T*>(state0_), *const state1 = static_cast<T*>(state1_);
  with_rule<Compute<T>>(u, [&](const auto& rule) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) rule(p, grad, state0, state1, i);
  });
}

}  // namespace torchbp::TORCHBP_LEVEL
