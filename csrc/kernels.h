// What stands between the operations and the machine: the list of kernels, and the descriptions that they run on.
//
// ops.h works out shapes, layouts and errors once for every device and hands a description from this file to a
// backend: cpu/backend.h (threads, SIMD levels) or cuda/backend.h (launches). A backend is a struct with the static
// functions that cpu/backend.h lists.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <string_view>

#include "gates.h"

namespace torchbp {

using torch::headeronly::ScalarType;

// Whether a row says so: of the text of a column, as a macro has it.
constexpr bool text_is(std::string_view text, std::string_view wanted) { return text == wanted; }

// One entry per column of the table that is compiled: relu_forward, relu_backward, ..., multiply_backward_b.
enum class Kernel : int {
#define ROW(name, ...) name##_forward, name##_backward,
  TORCHBP_UNARY_GATES(ROW)
#undef ROW
#define ROW(name, ...) name##_forward, name##_backward, name##_backward_a, name##_backward_b,
      TORCHBP_BINARY_GATES(ROW)
#undef ROW
          count
};

// What a unary gradient column reads: dy alone, or dy and the saved tensor.
#define TORCHBP_INPUTS_nothing 1
#define TORCHBP_INPUTS_x 2
#define TORCHBP_INPUTS_y 2

// The operands of each kernel.
struct Arity {
  int outputs, inputs;
};
constexpr Arity kArity[] = {
#define ROW(name, parameter, forward, saves, ...) {1, 1}, {1, TORCHBP_INPUTS_##saves},
    TORCHBP_UNARY_GATES(ROW)
#undef ROW
#define ROW(name, ...) {1, 2}, {2, 3}, {1, 3}, {1, 3},
        TORCHBP_BINARY_GATES(ROW)
#undef ROW
};

enum class Reduction : int64_t { none, mean, sum };  // the numbers PyTorch gives them

constexpr int kMaxDims = 64;     // PyTorch's own limit
constexpr int kMaxOperands = 5;  // multiply_backward: da, db and dy, a, b

// An elementwise loop: its operands (outputs first) broadcast to one shape, dimensions merged where they can be and
// ordered from the innermost (0) outwards. Strides are in bytes, so that one walk serves every dtype.
struct Loop {
  ScalarType dtype;
  int32_t device = -1;  // its index, as in cuda:0
  double parameter = 0;
  int64_t numel = 1;
  int ndim = 0;
  int operands = 0;
  int64_t sizes[kMaxDims];
  char* data[kMaxOperands];
  int64_t strides[kMaxOperands][kMaxDims];
};

// Softmax cross-entropy over the rows of a contiguous n x classes matrix.
// "Compute dtype" is float64 for float64 and float32 for every other.
struct SoftmaxCE {
  ScalarType dtype;
  int32_t device = -1;
  int64_t n = 0, classes = 0;
  const void* input = nullptr;          // [n, classes]
  bool soft = false;                    // whether the target is class probabilities, not class indices
  const int64_t* target = nullptr;      // [n] class indices
  const void* probabilities = nullptr;  // [n, classes]
  const void* weight = nullptr;         // [classes], or null for all ones
  double label_smoothing = 0;
  int64_t ignore_index = -100;
  void* lse = nullptr;  // [n] compute dtype: log-sum-exp of each row; written forward (if not null), read backward

  // Forward: what each row loses, 0 on ignored rows, in the dtype of the input; only for reduction "none".
  void* loss = nullptr;

  // Backward, and forward if it is to write the gradient too: row i receives grad[i * grad_stride] / *total.
  const void* grad = nullptr;          // null: 1
  int64_t grad_stride = 0;             // elements: 1 for reduction "none", else 0
  const void* total = nullptr;         // one number of the compute dtype
  void* grad_input = nullptr;          // [n, classes] or null
  void* grad_probabilities = nullptr;  // [n, classes] or null
};

// Maxout over the pieces of z [n, pieces, out]: y [n, out] and the index of the piece that won.
struct Maxout {
  ScalarType dtype;
  int32_t device = -1;
  int64_t n = 0, pieces = 0, out = 0;
  const void* z = nullptr;       // forward
  void* y = nullptr;             // forward
  uint8_t* index = nullptr;      // written forward, read backward
  const void* grad_y = nullptr;  // backward: [n, out]
  void* grad_z = nullptr;        // backward: [n, pieces, out], zero but where a piece won
};

}  // namespace torchbp
