// Argument checks of the raw operations, and the few tensor helpers that they share.
//
// A message reads "torchbp::OP: ARGUMENT ... got ..., wants ...". The stable ABI can only raise RuntimeError; Python
// users get TypeError, ValueError or IndexError from the checks of torchbp.functions, which run when one of these fails.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels.h"

namespace torchbp {

using torch::stable::Tensor;

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

// Sizes: a vector of them, or the sizes() of another tensor.
template <class Sizes>
bool has_shape(const Tensor& t, const Sizes& wanted) {
  return static_cast<size_t>(t.dim()) == wanted.size() && std::equal(wanted.begin(), wanted.end(), t.sizes().begin());
}

inline bool same_shape(const Tensor& a, const Tensor& b) { return has_shape(a, b.sizes()); }

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

inline std::string shape_text(const Tensor& t) { return shape_text(t.sizes()); }

template <class Sizes = std::vector<int64_t>>
void check_shape(const char* op, const char* argument, const Tensor& t, const Sizes& wanted) {
  STD_TORCH_CHECK(has_shape(t, wanted), "torchbp::", op, ": ", argument, " wants shape ", shape_text(wanted), ", got ",
                  shape_text(t));
}

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// A new tensor on the device of `like`, contiguous.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

// Stands for an output that was not asked for.
inline Tensor nothing(const Tensor& like) { return empty({0}, like.scalar_type(), like); }

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace torchbp
