// The activations that linear and mlp take by name: rows of the table as the epilogue of a product.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>
#include <string_view>

#include "kernels.h"

namespace torchbp {

// A row of the table as the epilogue of a product, or none.
struct Activation {
  Kernel forward = Kernel::count, backward = Kernel::count;
  bool any = false, saves_x = false;
};

inline Activation activation_of(const char* op, std::string_view wanted) {
  if (wanted == "none") return {};
#define ROW(name, parameter, forward, saves, ...)     \
  if (wanted == #name && !text_is(#saves, "nothing")) \
    return {Kernel::name##_forward, Kernel::name##_backward, true, text_is(#saves, "x")};
  TORCHBP_UNARY_GATES(ROW)
#undef ROW
  STD_TORCH_CHECK(false, "torchbp::", op,
                  ": activation wants the name of a unary gate that saves x or y, or none, got ", std::string(wanted));
}

}  // namespace torchbp
