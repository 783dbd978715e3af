// Every operation of torchbp, written once for all devices: shapes, layouts, errors, and which kernel runs.
//
// A device's library includes this file, names its Backend (cpu/backend.h lists what one has to offer) and calls
// register_operations<Backend>. Products that the backend does not take go to PyTorch's own linear and mm (MKL, oneDNN,
// cuBLAS).
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "activation.h"
#include "check.h"
#include "kernels.h"
#include "text.h"

namespace torchbp {

using torch::stable::detail::from;
using torch::stable::detail::to;

// ---- elementwise -------------------------------------------------------------------------------------------------

// The loop over `shape` that reads and writes the given tensors, outputs first, each broadcast to it.
inline Loop make_loop(std::initializer_list<const Tensor*> tensors, double parameter = 0) {
  const Tensor& first = **tensors.begin();
  Loop loop;
  loop.dtype = first.scalar_type();
  loop.device = first.get_device_index();
  loop.parameter = parameter;
  loop.operands = static_cast<int>(tensors.size());
  loop.numel = first.numel();
  const int64_t element = static_cast<int64_t>(first.element_size());
  bool plain = true;
  int k = 0;
  for (const Tensor* t : tensors) {
    STD_TORCH_CHECK(t->scalar_type() == loop.dtype, "torchbp: the operands of an elementwise loop differ in dtype");
    loop.data[k++] = const_cast<char*>(static_cast<const char*>(t->const_data_ptr()));
    plain = plain && t->is_contiguous() && (t == &first || same_shape(*t, first));
  }
  loop.sizes[0] = loop.numel;
  loop.ndim = 1;
  for (k = 0; k < loop.operands; ++k) loop.strides[k][0] = element;
  if (plain || loop.numel == 0) return loop;

  // Dimensions from the last to the first; those of size 1 do not matter.
  const auto sizes = first.sizes();
  const int64_t dims = first.dim();
  loop.ndim = 0;
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    loop.sizes[loop.ndim] = sizes[d];
    k = 0;
    for (const Tensor* t : tensors) {
      const int64_t own = d - (dims - t->dim());
      const bool broadcast = own < 0 || t->size(own) == 1;
      loop.strides[k++][loop.ndim] = broadcast ? 0 : t->stride(own) * element;
    }
    ++loop.ndim;
  }
  // The output's smallest stride innermost (insertion sort: there are few dimensions, mostly in order).
  const auto swap = [&](int i, int j) {
    std::swap(loop.sizes[i], loop.sizes[j]);
    for (int o = 0; o < loop.operands; ++o) std::swap(loop.strides[o][i], loop.strides[o][j]);
  };
  for (int i = 1; i < loop.ndim; ++i)
    for (int j = i; j > 0 && loop.strides[0][j] < loop.strides[0][j - 1]; --j) swap(j, j - 1);
  // Neighbours that every operand steps through evenly are one dimension.
  int last = 0;
  for (int d = 1; d < loop.ndim; ++d) {
    bool even = true;
    for (int o = 0; o < loop.operands; ++o) even &= loop.strides[o][d] == loop.strides[o][last] * loop.sizes[last];
    if (even) {
      loop.sizes[last] *= loop.sizes[d];
    } else if (++last != d) {
      swap(last, d);
    }
  }
  loop.ndim = last + 1;
  if (loop.numel == 1) {  // every dimension had size 1
    loop.ndim = 1;
    loop.sizes[0] = 1;
  }
  return loop;
}

// The operation that runs a kernel, by Kernel.
constexpr const char* kNames[] = {
#define ROW(name, ...) #name, #name "_backward",
    TORCHBP_UNARY_GATES(ROW)
#undef ROW
#define ROW(name, ...) #name, #name "_backward", #name "_backward_a", #name "_backward_b",
        TORCHBP_BINARY_GATES(ROW)
#undef ROW
};

template <Kernel kernel>
constexpr const char* name_of() {
  return kNames[static_cast<int>(kernel)];
}

// New tensors for results: contiguous, or like `t`, with its layout. Small ones are no matter of the backend's.
constexpr int64_t kMany = 1 << 17;

template <class Backend>
Tensor result(Sizes sizes, ScalarType dtype, const Tensor& like) {
  if constexpr (Backend::on_cpu) return Backend::empty_result(sizes, contiguous_strides(sizes).data(), dtype, like);
  return empty(sizes, dtype, like);
}

template <class Backend>
Tensor result_like(const Tensor& t) {
  if constexpr (Backend::on_cpu) {
    if (t.numel() >= kMany) {
      // Of a layout with gaps PyTorch knows what becomes; the memory that it asks for is left untouched, and gone again.
      std::vector<int64_t> strides(t.dim());
      std::ranges::copy((t.is_contiguous() ? t : new_like(t)).strides(), strides.begin());
      return Backend::empty_result(t.sizes(), strides.data(), t.scalar_type(), t);
    }
  }
  return new_like(t);
}

template <class Backend, Kernel kernel>
Tensor unary_with(const Tensor& x, double parameter) {
  check_floating(name_of<kernel>(), "x", x);
  const Tensor y = result_like<Backend>(x);
  Backend::elementwise(kernel, make_loop({&y, &x}, parameter));
  return y;
}

template <class Backend, Kernel kernel>
Tensor unary(const Tensor& x) {
  return unary_with<Backend, kernel>(x, 0);
}

// dx has the layout of the saved tensor, as x has.
template <class Backend, Kernel kernel>
Tensor unary_backward_with(const Tensor& dy, const Tensor& saved, double parameter) {
  check_floating(name_of<kernel>(), "dy", dy);
  check_like(name_of<kernel>(), "saved", saved, dy);
  check_shape(name_of<kernel>(), "saved", saved, dy.sizes());
  const Tensor dx = result_like<Backend>(saved);
  Backend::elementwise(kernel, make_loop({&dx, &dy, &saved}, parameter));
  return dx;
}

template <class Backend, Kernel kernel>
Tensor unary_backward(const Tensor& dy, const Tensor& saved) {
  return unary_backward_with<Backend, kernel>(dy, saved, 0);
}

inline std::vector<int64_t> broadcast_shape(const char* op, const Tensor& a, const Tensor& b) {
  const int64_t dims = std::max(a.dim(), b.dim());
  std::vector<int64_t> shape(dims);
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t in_a = d - (dims - a.dim()), in_b = d - (dims - b.dim());
    const int64_t size_a = in_a < 0 ? 1 : a.size(in_a), size_b = in_b < 0 ? 1 : b.size(in_b);
    STD_TORCH_CHECK(size_a == size_b || size_a == 1 || size_b == 1, "torchbp::", op, ": shapes ", shape_text(a),
                    " and ", shape_text(b), " do not broadcast");
    shape[d] = size_a == 1 ? size_b : size_a;
  }
  return shape;
}

// The layout follows the first input that has the full shape.
template <class Backend, Kernel kernel>
Tensor binary(const Tensor& a, const Tensor& b) {
  const char* op = name_of<kernel>();
  check_floating(op, "a", a);
  check_like(op, "b", b, a);
  const auto make = [&] {
    if (same_shape(a, b)) return result_like<Backend>(a);
    const auto shape = broadcast_shape(op, a, b);
    if (has_shape(a, shape)) return result_like<Backend>(a);
    if (has_shape(b, shape)) return result_like<Backend>(b);
    return result<Backend>(shape, a.scalar_type(), a);
  };
  const Tensor y = make();
  Backend::elementwise(kernel, make_loop({&y, &a, &b}));
  return y;
}

// Sums a gradient over the dimensions along which its input was broadcast.
inline Tensor reduce_to(const Tensor& full, const Tensor& input) {
  if (same_shape(full, input)) return full;
  std::vector<int64_t> dims;
  const int64_t added = full.dim() - input.dim();
  for (int64_t d = 0; d < full.dim(); ++d)
    if (d < added || (input.size(d - added) == 1 && full.size(d) != 1)) dims.push_back(d);
  const Tensor sum = torch::stable::sum(full, dims, /*keepdim=*/true);
  return torch::stable::reshape(sum, sizes_of(input));
}

template <class Backend>
Tensor gradient_buffer(const Tensor& dy, const Tensor& input) {
  return same_shape(dy, input) ? result_like<Backend>(input) : result<Backend>(dy.sizes(), dy.scalar_type(), dy);
}

inline void check_binary_backward(const char* op, const Tensor& dy, const Tensor& a, const Tensor& b) {
  check_floating(op, "dy", dy);
  check_like(op, "a", a, dy);
  check_like(op, "b", b, dy);
  if (!(same_shape(dy, a) && same_shape(dy, b))) check_shape(op, "dy", dy, broadcast_shape(op, a, b));
}

template <class Backend, Kernel kernel>
std::tuple<Tensor, Tensor> binary_backward(const Tensor& dy, const Tensor& a, const Tensor& b) {
  check_binary_backward(name_of<kernel>(), dy, a, b);
  const Tensor da = gradient_buffer<Backend>(dy, a), db = gradient_buffer<Backend>(dy, b);
  Backend::elementwise(kernel, make_loop({&da, &db, &dy, &a, &b}));
  return {reduce_to(da, a), reduce_to(db, b)};
}

template <class Backend, Kernel kernel>
Tensor binary_backward_one(const Tensor& dy, const Tensor& a, const Tensor& b) {
  check_binary_backward(name_of<kernel>(), dy, a, b);
  const Tensor& input = std::string_view(name_of<kernel>()).back() == 'a' ? a : b;
  const Tensor gradient = gradient_buffer<Backend>(dy, input);
  Backend::elementwise(kernel, make_loop({&gradient, &dy, &a, &b}));
  return reduce_to(gradient, input);
}

// ---- products ----------------------------------------------------------------------------------------------------

inline Tensor call(const char* op, std::initializer_list<StableIValue> arguments) {
  std::array<StableIValue, 8> stack{};
  std::copy(arguments.begin(), arguments.end(), stack.begin());
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

inline Tensor transpose(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }
inline Tensor mm(const Tensor& a, const Tensor& b) { return call("aten::mm", {from(a), from(b)}); }

// x W^T + b of a matrix x.
inline Tensor affine(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  // aten::linear picks each dtype's fastest path (oneDNN for bfloat16).
  return call("aten::linear", {from(x), from(weight), from(bias)});
}

// ---- activations of linear and mlp -------------------------------------------------------------------------------

// Applies an activation to z, a tensor of our own. Returns (y, saved): in place where the gradient reads y.
template <class Backend>
std::tuple<Tensor, Tensor> activate(const Tensor& z, const Activation& activation, double parameter) {
  if (!activation.any) return {z, nothing(z)};
  const Tensor y = activation.saves_x ? result_like<Backend>(z) : z;
  Backend::elementwise(activation.forward, make_loop({&y, &z}, parameter));
  return {y, activation.saves_x ? z : nothing(z)};
}

// dz of an activation from dy and what it saved (its input z or its output y).
template <class Backend>
Tensor activate_backward(const Tensor& dy, const Tensor& saved, const Activation& activation, double parameter) {
  if (!activation.any) return dy;
  const Tensor dz = result_like<Backend>(saved);
  Backend::elementwise(activation.backward, make_loop({&dz, &dy, &saved}, parameter));
  return dz;
}

// ---- linear ------------------------------------------------------------------------------------------------------

inline void check_linear(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_floating(op, "x", x);
  check_like(op, "weight", weight, x);
  STD_TORCH_CHECK(weight.dim() == 2, "torchbp::", op, ": weight wants shape (out_features, in_features), got ",
                  shape_text(weight));
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), "torchbp::", op, ": x wants shape (..., ",
                  weight.size(1), "), got ", shape_text(x));
  if (bias) {
    check_like(op, "bias", *bias, x);
    check_shape(op, "bias", *bias, {weight.size(0)});
  }
}

// What a layer makes of x, or the gradient of that: shape (..., out_features).
inline void check_rows(const char* op, const char* argument, const Tensor& t, const Tensor& x, const Tensor& weight) {
  check_like(op, argument, t, x);
  auto shape = sizes_of(x);
  shape.back() = weight.size(0);
  check_shape(op, argument, t, shape);
}

// A tensor's leading dimensions as one.
inline Tensor matrix(const Tensor& t) {
  if (t.dim() == 2) return t;
  const int64_t columns = t.size(t.dim() - 1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return torch::stable::reshape(t, {rows, columns});
}

// New rows, with the leading dimensions of x. The same memory, but not by reshape: autograd would take the result for a
// view, and a Function's output that is one may not be changed in place.
inline Tensor like_rows_of(const Tensor& x, const Tensor& new_rows) {
  if (x.dim() == 2) return new_rows;
  const Tensor rows = dense(new_rows);
  auto shape = sizes_of(x);
  shape.back() = rows.size(1);
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(rows.get(), static_cast<int64_t>(shape.size()), shape.data(),
                                                        contiguous_strides(shape).data(), rows.storage_offset(),
                                                        &result));
  return Tensor(result);
}

// y = f(x W^T + b) of a matrix x. Returns (y, z): z is the product before an activation whose gradient needs it, else
// empty.
template <class Backend>
std::tuple<Tensor, Tensor> layer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                 const Activation& f, double parameter) {
  if constexpr (Backend::own_products)
    if (Backend::fits(x, weight.size(1), weight.size(0))) return Backend::linear(x, weight, bias, f, parameter);
  if constexpr (Backend::fused_products)
    if (bias && f.forward == Kernel::relu_forward)
      if (const auto y = Backend::affine_relu(x, weight, *bias)) return {*y, nothing(*y)};
  return activate<Backend>(affine(x, weight, bias), f, parameter);
}

// The same for any leading dimensions.
template <class Backend>
std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                  Text activation, double parameter) {
  check_linear("linear", x, weight, bias);
  const Activation f = activation_of("linear", activation);
  const auto [y, z] = layer<Backend>(matrix(x), weight, bias, f, parameter);
  return {like_rows_of(x, y), f.saves_x ? like_rows_of(x, z) : z};
}

// dz [n, out] -> dx = dz W, dW = dz^T x, db = sum of dz over the rows. Those not asked for are empty. What is read by
// none that is may be missing: W [out, in] where no dx is, x [n, in] where no dW is.
template <class Backend>
std::array<Tensor, 3> affine_backward(const Tensor& dz, const std::optional<Tensor>& x,
                                      const std::optional<Tensor>& weight, bool need_x, bool need_weight,
                                      bool need_bias) {
  if constexpr (Backend::own_products) {
    const int64_t in = weight ? weight->size(1) : x ? x->size(1) : 0;
    if (Backend::fits(dz, in, dz.size(1)))
      return Backend::affine_backward(dz, x, weight, need_x, need_weight, need_bias);
  }
  if constexpr (Backend::fused_products)
    if (need_weight && need_bias)
      if (const auto both = Backend::weight_and_bias_gradient(dz, *x))
        return {need_x ? mm(dz, *weight) : nothing(dz), (*both)[0], (*both)[1]};
  const std::array<int64_t, 1> rows{0};
  return {need_x ? mm(dz, *weight) : nothing(dz), need_weight ? mm(transpose(dz), *x) : nothing(dz),
          need_bias ? torch::stable::sum(dz, rows) : nothing(dz)};
}

// The arguments of linear_backward. Those that no gradient asked for reads may be missing.
inline void check_linear_backward(const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
                                  const std::optional<Tensor>& saved, bool reads_x, bool reads_weight,
                                  bool reads_saved) {
  const char* op = "linear_backward";
  const auto is_given = [&](const char* argument, const std::optional<Tensor>& t, bool read) {
    STD_TORCH_CHECK(t || !read, "torchbp::", op, ": ", argument, " wants a tensor for what is asked, got None");
    if (t) check_like(op, argument, *t, dy);
    return t.has_value();
  };
  check_floating(op, "dy", dy);
  STD_TORCH_CHECK(dy.dim() >= 1, "torchbp::", op, ": dy wants shape (..., out_features), got a number");
  auto shape = sizes_of(dy);
  const int64_t out = shape.back();
  if (reads_saved && is_given("saved", saved, true)) check_shape(op, "saved", *saved, shape);
  if (is_given("weight", weight, reads_weight)) {
    STD_TORCH_CHECK(weight->dim() == 2 && weight->size(0) == out, "torchbp::", op, ": weight wants shape (", out,
                    ", in_features), got ", shape_text(*weight));
    shape.back() = weight->size(1);
  }
  if (is_given("x", x, reads_x)) {
    if (!weight && x->dim() >= 1) shape.back() = x->size(x->dim() - 1);
    check_shape(op, "x", *x, shape);
  }
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const std::optional<Tensor>& x_,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& saved, Text activation,
                                                   double parameter, bool need_x, bool need_weight, bool need_bias) {
  const Activation f = activation_of("linear_backward", activation);
  check_linear_backward(dy, x_, weight, saved, need_weight, need_x, f.any);
  const Tensor dz = f.any ? activate_backward<Backend>(matrix(dy), matrix(*saved), f, parameter) : matrix(dy);
  const std::optional<Tensor> x = x_ ? std::optional<Tensor>(matrix(*x_)) : x_;
  const auto [dx, dw, db] = affine_backward<Backend>(dz, x, weight, need_x, need_weight, need_bias);
  return {need_x ? like_rows_of(dy, dx) : dx, dw, db};
}

// ---- mlp ---------------------------------------------------------------------------------------------------------

inline void check_mlp(const char* op, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  STD_TORCH_CHECK(!weights.empty(), "torchbp::", op, ": weights wants at least one matrix");
  STD_TORCH_CHECK(biases.empty() || biases.size() == weights.size(), "torchbp::", op, ": biases wants none or ",
                  weights.size(), ", got ", biases.size());
}

// A whole network: f between the layers, none after the last. Returns (y, saved...): of each hidden layer its output
// h, and before it z where the gradient of f reads that.
template <class Backend>
std::vector<Tensor> mlp(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                        const Text& activation, double parameter) {
  check_mlp("mlp", weights, biases);
  const Activation f = activation_of("mlp", activation);
  check_floating("mlp", "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, "torchbp::mlp: x wants shape (..., in_features), got a number");
  if constexpr (Backend::own_products)
    if (Backend::fits_network(x, weights, biases)) return Backend::mlp(x, weights, biases, f, parameter);
  std::vector<Tensor> result(1);
  Tensor h = matrix(x);
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::optional<Tensor> bias = biases.empty() ? std::nullopt : std::optional<Tensor>(biases[i]);
    check_linear("mlp", h, weights[i], bias);
    const bool last = i + 1 == weights.size();
    auto [y, saved] = layer<Backend>(h, weights[i], bias, last ? Activation() : f, parameter);
    if (last) {
      result[0] = like_rows_of(x, y);
      break;
    }
    if (f.saves_x) result.push_back(like_rows_of(x, saved));
    result.push_back(like_rows_of(x, y));
    h = y;
  }
  return result;
}

// (dx, dweights..., dbiases...), empty where not asked for.
template <class Backend>
std::vector<Tensor> mlp_backward(const Tensor& dy, const Tensor& x, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& saved, const Text& activation, double parameter,
                                 bool need_x, const std::vector<int64_t>& need_weights,
                                 const std::vector<int64_t>& need_biases) {
  const Activation f = activation_of("mlp_backward", activation);
  const size_t layers = weights.size(), per_layer = f.saves_x ? 2 : 1;
  STD_TORCH_CHECK(layers > 0 && saved.size() == (layers - 1) * per_layer && need_weights.size() == layers &&
                      (need_biases.empty() || need_biases.size() == layers),
                  "torchbp::mlp_backward: wants what mlp returned and one flag for each weight and bias");
  for (size_t i = 0; i < layers; ++i) {
    check_linear("mlp_backward", i == 0 ? x : saved[i * per_layer - 1], weights[i], std::nullopt);
    if (i + 1 == layers) break;
    for (size_t j = 0; j < per_layer; ++j) check_rows("mlp_backward", "saved", saved[i * per_layer + j], x, weights[i]);
  }
  check_rows("mlp_backward", "dy", dy, x, weights.back());
  if constexpr (Backend::own_products)
    if (Backend::fits_network(x, weights, {}) && Backend::fits_saved(saved, x.size(0)))
      return Backend::mlp_backward(dy, x, weights, saved, f, parameter, need_x, need_weights, need_biases);
  std::vector<Tensor> result(1 + layers + need_biases.size());
  Tensor dz = matrix(dy);
  for (size_t i = layers; i-- > 0;) {
    // The layer's input, and whether anything further down is asked for.
    const Tensor h = matrix(i == 0 ? x : saved[i * per_layer - 1]);
    bool further = need_x;
    for (size_t j = 0; j < i; ++j) further |= need_weights[j] || (!need_biases.empty() && need_biases[j]);
    std::optional<Tensor> through;  // dz of the layer below
    if constexpr (Backend::fused_products)
      if (i > 0 && further && f.forward == Kernel::relu_forward)
        through = Backend::product_through_relu(dz, weights[i], h);
    auto [dh, dw, db] = affine_backward<Backend>(dz, h, weights[i], further && !through, need_weights[i],
                                                 !need_biases.empty() && need_biases[i]);
    result[1 + i] = dw;
    if (!need_biases.empty()) result[1 + layers + i] = db;
    if (i == 0) {
      result[0] = need_x ? like_rows_of(x, dh) : dh;
    } else if (further) {
      dz = through ? *through : activate_backward<Backend>(dh, matrix(saved[(i - 1) * per_layer]), f, parameter);
    } else {
      for (size_t j = 0; j < i; ++j) {
        result[1 + j] = nothing(x);
        if (!need_biases.empty()) result[1 + layers + j] = nothing(x);
      }
      result[0] = nothing(x);
      break;
    }
  }
  return result;
}

// ---- softmax cross-entropy ---------------------------------------------------------------------------------------

inline SoftmaxCE describe_softmax_ce(const char* op, const Tensor& input, const Tensor& target,
                                     const std::optional<Tensor>& weight, int64_t ignore_index,
                                     double label_smoothing) {
  check_floating(op, "input", input);
  STD_TORCH_CHECK(input.dim() == 2, "torchbp::", op, ": input wants shape (N, C), got ", shape_text(input));
  SoftmaxCE ce;
  ce.dtype = input.scalar_type();
  ce.device = input.get_device_index();
  ce.n = input.size(0);
  ce.classes = input.size(1);
  ce.input = input.const_data_ptr();
  ce.ignore_index = ignore_index;
  ce.label_smoothing = label_smoothing;
  check_device(op, "target", target, input);
  if (target.scalar_type() == ScalarType::Long) {
    check_shape(op, "target", target, {ce.n});
    ce.target = static_cast<const int64_t*>(target.const_data_ptr());
  } else {
    check_like(op, "target", target, input);
    check_shape(op, "target", target, {ce.n, ce.classes});
    ce.soft = true;
    ce.probabilities = target.const_data_ptr();
  }
  if (weight) {
    check_like(op, "weight", *weight, input);
    check_shape(op, "weight", *weight, {ce.classes});
    ce.weight = weight->const_data_ptr();
  }
  return ce;
}

inline Reduction reduction_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 2,
                  "torchbp::softmax_ce: reduction wants 0 (none), 1 (mean) or 2 (sum), got ", number);
  return static_cast<Reduction>(number);
}

// Returns (loss, lse [N], total): total is what a mean was divided by, 1 otherwise.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> softmax_ce(const Tensor& input_, const Tensor& target_,
                                              std::optional<Tensor> weight_, int64_t ignore_index, int64_t reduction_,
                                              double label_smoothing) {
  const Tensor input = dense(input_), target = dense(target_);
  const auto weight = dense_if_any(weight_);
  const Reduction reduction = reduction_of(reduction_);
  SoftmaxCE ce = describe_softmax_ce("softmax_ce", input, target, weight, ignore_index, label_smoothing);
  const ScalarType compute = compute_dtype(ce.dtype);
  const Tensor lse = empty({ce.n}, compute, input), total = empty({}, compute, input);
  const Tensor loss =
      empty(reduction == Reduction::none ? std::vector<int64_t>{ce.n} : std::vector<int64_t>{}, ce.dtype, input);
  ce.lse = lse.mutable_data_ptr();
  Backend::softmax_ce_forward(ce, reduction, loss.mutable_data_ptr(), total.mutable_data_ptr());
  return {loss, lse, total};
}

// Returns (loss, dinput), the gradient for an upstream gradient of 1 written while the row is at hand: for a loss that is
// one number.
template <class Backend>
std::tuple<Tensor, Tensor> softmax_ce_with_gradient(const Tensor& input_, const Tensor& target_,
                                                    std::optional<Tensor> weight_, int64_t ignore_index,
                                                    int64_t reduction_, double label_smoothing) {
  const char* op = "softmax_ce_with_gradient";
  const Tensor input = dense(input_), target = dense(target_);
  const auto weight = dense_if_any(weight_);
  const Reduction reduction = reduction_of(reduction_);
  STD_TORCH_CHECK(reduction != Reduction::none, "torchbp::", op, ": reduction wants 1 (mean) or 2 (sum), got 0");
  SoftmaxCE ce = describe_softmax_ce(op, input, target, weight, ignore_index, label_smoothing);
  const Tensor loss = empty({}, ce.dtype, input), dinput = result<Backend>({ce.n, ce.classes}, ce.dtype, input);
  double total;  // room for either compute dtype
  ce.grad_input = dinput.mutable_data_ptr();
  Backend::softmax_ce_forward(ce, reduction, loss.mutable_data_ptr(), Backend::on_cpu ? &total : nullptr);
  return {loss, dinput};
}

// Returns (dinput, dtarget), empty where not asked for; dtarget only for class probabilities.
template <class Backend>
std::tuple<Tensor, Tensor> softmax_ce_backward(const Tensor& dloss, const Tensor& input_, const Tensor& target_,
                                               std::optional<Tensor> weight_, const Tensor& lse_, const Tensor& total,
                                               int64_t ignore_index, int64_t reduction_, double label_smoothing,
                                               bool need_input, bool need_target) {
  const char* op = "softmax_ce_backward";
  const Tensor input = dense(input_), target = dense(target_), grad = dense(dloss);
  const auto weight = dense_if_any(weight_);
  const Reduction reduction = reduction_of(reduction_);
  SoftmaxCE ce = describe_softmax_ce(op, input, target, weight, ignore_index, label_smoothing);
  check_like(op, "dloss", dloss, input);
  check_shape(op, "dloss", dloss, reduction == Reduction::none ? std::vector<int64_t>{ce.n} : std::vector<int64_t>{});
  const Tensor lse = dense(lse_);
  check_shape(op, "lse", lse, {ce.n});
  check_device(op, "lse", lse, input);
  check_device(op, "total", total, input);
  STD_TORCH_CHECK(lse.scalar_type() == compute_dtype(ce.dtype) && total.scalar_type() == compute_dtype(ce.dtype) &&
                      total.numel() == 1,
                  "torchbp::", op, ": lse and total want what softmax_ce returned");
  STD_TORCH_CHECK(!(need_target && !ce.soft), "torchbp::", op, ": class indices have no gradient");
  const Tensor dinput = need_input ? result<Backend>({ce.n, ce.classes}, ce.dtype, input) : nothing(input);
  const Tensor dtarget = need_target ? result<Backend>({ce.n, ce.classes}, ce.dtype, input) : nothing(input);
  ce.lse = lse.mutable_data_ptr();
  ce.total = total.const_data_ptr();
  ce.grad = grad.const_data_ptr();
  ce.grad_stride = reduction == Reduction::none ? 1 : 0;
  ce.grad_input = need_input ? dinput.mutable_data_ptr() : nullptr;
  ce.grad_probabilities = need_target ? dtarget.mutable_data_ptr() : nullptr;
  Backend::softmax_ce_backward(ce);
  return {dinput, dtarget};
}

// ---- maxout ------------------------------------------------------------------------------------------------------

// The largest of the pieces of z [..., pieces, out], and which it was: the first of equals.
template <class Backend>
std::tuple<Tensor, Tensor> max_pieces(const Tensor& z_) {
  check_floating("max_pieces", "z", z_);
  STD_TORCH_CHECK(z_.dim() >= 2 && z_.size(z_.dim() - 2) >= 1 && z_.size(z_.dim() - 2) <= 256,
                  "torchbp::max_pieces: z wants shape (..., pieces, out) with 1 to 256 pieces, got ", shape_text(z_));
  const Tensor z = dense(z_);
  auto shape = sizes_of(z);
  Maxout maxout;
  maxout.dtype = z.scalar_type();
  maxout.device = z.get_device_index();
  maxout.out = shape.back();
  maxout.pieces = shape[shape.size() - 2];
  shape.erase(shape.end() - 2);
  const Tensor y = result<Backend>(shape, maxout.dtype, z), index = empty(shape, ScalarType::Byte, z);
  maxout.n = maxout.out == 0 ? 0 : y.numel() / maxout.out;
  maxout.z = z.const_data_ptr();
  maxout.y = y.mutable_data_ptr();
  maxout.index = static_cast<uint8_t*>(index.mutable_data_ptr());
  Backend::maxout_forward(maxout);
  return {y, index};
}

// dz [..., pieces, out]: dy where the piece won, 0 elsewhere.
template <class Backend>
Tensor max_pieces_backward(const Tensor& dy_, const Tensor& index_, int64_t pieces) {
  check_floating("max_pieces_backward", "dy", dy_);
  check_shape("max_pieces_backward", "index", index_, dy_.sizes());
  check_device("max_pieces_backward", "index", index_, dy_);
  STD_TORCH_CHECK(index_.scalar_type() == ScalarType::Byte && dy_.dim() >= 1,
                  "torchbp::max_pieces_backward: index wants what max_pieces returned");
  STD_TORCH_CHECK(pieces >= 1 && pieces <= 256, "torchbp::max_pieces_backward: pieces wants 1 to 256, got ", pieces);
  const Tensor dy = dense(dy_), index = dense(index_);
  auto shape = sizes_of(dy);
  Maxout maxout;
  maxout.dtype = dy.scalar_type();
  maxout.device = dy.get_device_index();
  maxout.out = shape.back();
  maxout.pieces = pieces;
  maxout.n = maxout.out == 0 ? 0 : dy.numel() / maxout.out;
  shape.insert(shape.end() - 1, pieces);
  const Tensor dz = result<Backend>(shape, maxout.dtype, dy);
  maxout.grad_y = dy.const_data_ptr();
  maxout.index = static_cast<uint8_t*>(index.mutable_data_ptr());
  maxout.grad_z = dz.mutable_data_ptr();
  Backend::maxout_backward(maxout);
  return dz;
}

// ---- l2_penalty --------------------------------------------------------------------------------------------------

// R = sum of all squares of all tensors.
template <class Backend>
Tensor l2_penalty(std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "torchbp::l2_penalty: tensors wants at least one tensor");
  const Tensor& first = tensors[0];
  const ScalarType dtype = first.scalar_type();
  check_floating("l2_penalty", "tensors[0]", first);
  Tensor result = empty({}, compute_dtype(dtype), first);
  torch::stable::zero_(result);
  for (const Tensor& t : tensors) {
    check_like("l2_penalty", "tensors", t, first);
    const Tensor flat = dense(t);
    if (flat.numel())
      Backend::add_sum_of_squares(flat.const_data_ptr(), dtype, flat.numel(), result.mutable_data_ptr(),
                                  flat.get_device_index());
  }
  return compute_dtype(dtype) == dtype ? result : torch::stable::to(result, dtype);
}

// ---- registration ------------------------------------------------------------------------------------------------

using torch::stable::detail::StableLibrary;

// Registers the operations of elementwise rows for one device. A row that saves nothing has a gradient column in dy
// alone: the shape of its forward column.
template <class Backend, Kernel forward, Kernel backward, bool has_parameter, bool saves_nothing>
void register_unary(StableLibrary& m) {
  const char *name = name_of<forward>(), *backward_name = name_of<backward>();
  if constexpr (has_parameter) {
    m.impl(name, TORCH_BOX((&unary_with<Backend, forward>)));
    if constexpr (saves_nothing)
      m.impl(backward_name, TORCH_BOX((&unary_with<Backend, backward>)));
    else
      m.impl(backward_name, TORCH_BOX((&unary_backward_with<Backend, backward>)));
  } else {
    m.impl(name, TORCH_BOX((&unary<Backend, forward>)));
    if constexpr (saves_nothing)
      m.impl(backward_name, TORCH_BOX((&unary<Backend, backward>)));
    else
      m.impl(backward_name, TORCH_BOX((&unary_backward<Backend, backward>)));
  }
}

template <class Backend>
void register_operations(StableLibrary& m) {
#define ROW(name, parameter, forward, saves, ...)                                                        \
  register_unary<Backend, Kernel::name##_forward, Kernel::name##_backward, !text_is(#parameter, "none"), \
                 text_is(#saves, "nothing")>(m);
  TORCHBP_UNARY_GATES(ROW)
#undef ROW
#define ROW(name, ...)                                                                                \
  m.impl(#name, TORCH_BOX((&binary<Backend, Kernel::name##_forward>)));                               \
  m.impl(#name "_backward", TORCH_BOX((&binary_backward<Backend, Kernel::name##_backward>)));         \
  m.impl(#name "_backward_a", TORCH_BOX((&binary_backward_one<Backend, Kernel::name##_backward_a>))); \
  m.impl(#name "_backward_b", TORCH_BOX((&binary_backward_one<Backend, Kernel::name##_backward_b>)));
  TORCHBP_BINARY_GATES(ROW)
#undef ROW
  m.impl("linear", TORCH_BOX((&linear<Backend>)));
  m.impl("linear_backward", TORCH_BOX((&linear_backward<Backend>)));
  m.impl("mlp", TORCH_BOX((&mlp<Backend>)));
  m.impl("mlp_backward", TORCH_BOX((&mlp_backward<Backend>)));
  m.impl("softmax_ce", TORCH_BOX((&softmax_ce<Backend>)));
  m.impl("softmax_ce_with_gradient", TORCH_BOX((&softmax_ce_with_gradient<Backend>)));
  m.impl("softmax_ce_backward", TORCH_BOX((&softmax_ce_backward<Backend>)));
  m.impl("max_pieces", TORCH_BOX((&max_pieces<Backend>)));
  m.impl("max_pieces_backward", TORCH_BOX((&max_pieces_backward<Backend>)));
  m.impl("l2_penalty", TORCH_BOX((&l2_penalty<Backend>)));
}

}  // namespace torchbp
