// Argument checks of the raw operations, and the few tensor helpers that they share.
//
// A message reads "torchbp::OP: ARGUMENT ... got ..., wants ...". The stable ABI can only raise RuntimeError; Python
// users get TypeError, ValueError or IndexError from the checks of torchbp.functions, which run when one of these fails.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace torchbp {

using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

inline void check_floating(const char* op, const char* argument, const Tensor& t) {
  STD_TORCH_CHECK(is_floating(t.scalar_type()), "torchbp::", op, ": ", argument,
                  " wants dtype float64, float32, bfloat16 or float16, got ScalarType ",
                  static_cast<int>(t.scalar_type()));
}

inline void check_device(const char* op, const char* argument, const Tensor& t, const Tensor& first) {
  STD_TORCH_CHECK(t.device() == first.device(), "torchbp::", op, ": ", argument,
                  " is on another device than the first argument");
}

// Same dtype and device as the first argument.
inline void check_like(const char* op, const char* argument, const Tensor& t, const Tensor& first) {
  STD_TORCH_CHECK(t.scalar_type() == first.scalar_type(), "torchbp::", op, ": ", argument,
                  " has another dtype than the first argument: ScalarType ", static_cast<int>(t.scalar_type()), " and ",
                  static_cast<int>(first.scalar_type()));
  check_device(op, argument, t, first);
}

inline bool has_shape(const Tensor& t, Sizes wanted) {
  const Sizes sizes = t.sizes();
  return sizes.size() == wanted.size() && std::equal(wanted.begin(), wanted.end(), sizes.begin());
}

inline bool same_shape(const Tensor& a, const Tensor& b) { return has_shape(a, b.sizes()); }

inline std::string shape_text(Sizes sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

inline std::string shape_text(const Tensor& t) { return shape_text(t.sizes()); }

inline void check_shape(const char* op, const char* argument, const Tensor& t, Sizes wanted) {
  STD_TORCH_CHECK(has_shape(t, wanted), "torchbp::", op, ": ", argument, " wants shape ", shape_text(wanted), ", got ",
                  shape_text(t));
}

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// A new tensor on the device of `like`. Not through the dispatcher, which takes a microsecond to find an operation.
inline Tensor empty_strided(Sizes sizes, const int64_t* strides, int32_t dtype, const Tensor& like) {
  int32_t device_type, device_index;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype,
                                                  device_type, device_index, &result));
  return Tensor(result);
}

inline std::array<int64_t, kMaxDims> contiguous_strides(Sizes sizes) {
  std::array<int64_t, kMaxDims> strides{};
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

// A new tensor on the device of `like`, contiguous.
inline Tensor empty(Sizes sizes, ScalarType dtype, const Tensor& like) {
  return empty_strided(sizes, contiguous_strides(sizes).data(),
                       torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), like);
}

// A new tensor like `t`, with its layout: torch.empty_like.
inline Tensor new_like(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::empty_like(t);
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return empty_strided(t.sizes(), t.strides().data(), dtype, t);
}

// Stands for an output that was not asked for.
inline Tensor nothing(const Tensor& like) { return empty({0}, like.scalar_type(), like); }

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline std::optional<Tensor> dense_if_any(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(dense(*t)) : t;
}

inline float* floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace torchbp
