// The rules of ../update.h in a GPU's memory, for kernels that are told only there which rule to follow.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "../update.h"

namespace torchbp::cuda {

// One of some rules, with its numbers.
template <class... Rules>
class OneOf {
public:
  OneOf() = default;
  explicit OneOf(const Update& update) {
    with_rule<float>(update, [&](const auto& rule) {
      using Rule = std::decay_t<decltype(rule)>;
      static_assert((std::is_same_v<Rule, Rules> || ...) && std::is_trivially_copyable_v<Rule>);
      int which = 0;
      ((std::is_same_v<Rule, Rules> ? void(which_ = which) : void(), ++which), ...);
      std::memcpy(memory_, &rule, sizeof(rule));
    });
  }

  // f(rule)
  template <class F>
  __device__ __forceinline__ void visit(const F& f) const {
    int which = 0;
    ((which_ == which++ ? f(Rules(*reinterpret_cast<const Rules*>(memory_))) : void()), ...);
  }

private:
  static constexpr size_t most(std::initializer_list<size_t> sizes) { return std::max(sizes); }

  int which_ = 0;
  alignas(float) unsigned char memory_[most({sizeof(Rules)...})] = {};
};

using AnyRule =
    OneOf<AdamW<float>, Sgd<float, false, false, false>, Sgd<float, true, false, false>, Sgd<float, false, true, false>,
          Sgd<float, true, true, false>, Sgd<float, false, true, true>, Sgd<float, true, true, true>>;

// Updates float32 parameters, each by the rule of its number that is in `rules` when the kernel runs (optim.cu).
void update_by(const char* op, const std::vector<Parameter>& parameters, const AnyRule* rules);

}  // namespace torchbp::cuda
