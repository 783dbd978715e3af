// The columns of the table as functions of one element, for the CPU's loops and CUDA's threads alike.
//
//   relu_forward::apply(in = {x}, out = {y}, parameter)
//   relu_backward::apply(in = {dy, saved}, out = {dx}, parameter)      saved: x or y; absent where a row saves nothing
//   multiply_backward::apply(in = {dy, a, b}, out = {da, db}, parameter)   and _backward_a, _backward_b for one alone
#pragma once

#include "gates.h"
#include "kernels.h"
#include "math.h"

namespace torchbp::TORCHBP_LEVEL {

template <int n_in, int n_out>
struct Column {
  static constexpr int inputs = n_in, outputs = n_out;
  static constexpr bool is_tanh = false;  // whether the text is tanh(x) and no more
};

// What a row saves, as the declaration that its gradient column reads.
#define DECLARE_nothing(in)
#define DECLARE_x(in) [[maybe_unused]] const C x = in[1];
#define DECLARE_y(in) [[maybe_unused]] const C y = in[1];

#define ROW(name, parameter, forward, saves, backward, second)                                      \
  struct name##_forward : Column<1, 1> {                                                            \
    static constexpr bool is_tanh = text_is(#forward, "tanh(x)");                                   \
    template <class C>                                                                              \
    static TORCHBP_INLINE void apply(const C (&in)[1], C (&out)[1], [[maybe_unused]] C parameter) { \
      const C x = in[0];                                                                            \
      out[0] = forward;                                                                             \
    }                                                                                               \
  };                                                                                                \
  struct name##_backward : Column<TORCHBP_INPUTS_##saves, 1> {                                      \
    template <class C>                                                                              \
    static TORCHBP_INLINE void apply(const C (&in)[TORCHBP_INPUTS_##saves], C (&out)[1],            \
                                     [[maybe_unused]] C parameter) {                                \
      const C dy = in[0];                                                                           \
      DECLARE_##saves(in) out[0] = backward;                                                        \
    }                                                                                               \
  };
TORCHBP_UNARY_GATES(ROW)
#undef ROW

#define FUNCTION(name, n_in, n_out, ...)                                        \
  struct name : Column<n_in, n_out> {                                           \
    template <class C>                                                          \
    static TORCHBP_INLINE void apply(const C (&in)[n_in], C (&out)[n_out], C) { \
      [[maybe_unused]] const C dy = in[0], a = in[n_in - 2], b = in[n_in - 1];  \
      __VA_ARGS__                                                               \
    }                                                                           \
  };
#define ROW(name, forward, saves, backward_a, backward_b, aa, ab, bb)        \
  FUNCTION(name##_forward, 2, 1, out[0] = forward;)                          \
  FUNCTION(name##_backward, 3, 2, out[0] = backward_a; out[1] = backward_b;) \
  FUNCTION(name##_backward_a, 3, 1, out[0] = backward_a;)                    \
  FUNCTION(name##_backward_b, 3, 1, out[0] = backward_b;)
TORCHBP_BINARY_GATES(ROW)
#undef ROW
#undef FUNCTION

#undef DECLARE_nothing
#undef DECLARE_x
#undef DECLARE_y

}  // namespace torchbp::TORCHBP_LEVEL
