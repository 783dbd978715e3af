// A string argument of an operation.
//
// PyTorch unboxes to a std::string by copying one that it allocates and never deletes (ToImpl<std::string> in
// torch/csrc/stable/stableivalue_conversions.h, up to 2.13 at least): 48 bytes lost in every call.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace torchbp {

struct Text : std::string {
  using std::string::string;
};

}  // namespace torchbp

template <>
struct torch::stable::detail::ToImpl<torchbp::Text> {
  static torchbp::Text call(StableIValue value, uint64_t, bool) {
    StringHandle handle = to<StringHandle>(value);
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    torchbp::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
