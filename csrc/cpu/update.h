// An optimizer's rule (../update.h) over contiguous runs, for the level at hand.
#pragma once

#include "../update.h"

namespace torchbp::TORCHBP_LEVEL {

// By value, so that no number that is written can be one of the rule's.
template <class T, class R>
void update_by(const R rule, T* p, const T* grad, T* state0, T* state1, int64_t n) {
  using C = Compute<T>;
  int64_t i = 0;
  if constexpr (!std::is_same_v<T, C>) {  // half types: a vector at a time
    constexpr int64_t width = TORCHBP_VECTOR / sizeof(C);
    for (; i + width <= n; i += width) {
      C old[width], g[width], s0[width], s1[width];
      load_n(old, p + i, width);
      load_n(g, grad + i, width);
      if constexpr (R::states > 0) load_n(s0, state0 + i, width);
      if constexpr (R::states > 1) load_n(s1, state1 + i, width);
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) rule(old, g, s0, s1, j);
      store_n(p + i, old, width);
      if constexpr (R::states > 0) store_n(state0 + i, s0, width);
      if constexpr (R::states > 1) store_n(state1 + i, s1, width);
    }
  }
#pragma GCC ivdep
  for (; i < n; ++i) rule(p, grad, state0, state1, i);
}

// state: the momentum buffer (null without momentum), or exp_avg and exp_avg_sq.
template <class T>
void update(const Update& u, void* parameter, const void* grad, void* state0, void* state1, int64_t n) {
  with_rule<Compute<T>>(u, [&](const auto& rule) {
    update_by(rule, static_cast<T*>(parameter), static_cast<const T*>(grad), static_cast<T*>(state0),
              static_cast<T*>(state1), n);
  });
}

}  // namespace torchbp::TORCHBP_LEVEL
