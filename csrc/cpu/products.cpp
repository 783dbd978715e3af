// linear, mlp and their gradients on this backend's own products (gemm.h, network.h): of float32, of bfloat16 where the
// level has them, and of half types where the machine has no instructions for them.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <string_view>

#include "../check.h"
#include "backend.h"
#include "network.h"

namespace torchbp {
namespace {

// Up to this many numbers of memory are kept from call to call.
constexpr int64_t kKept = 1 << 20;
// From this many examples on a copy of any weight to where tiles want it is repaid. With fewer, float32 reads weights
// where they lie; bfloat16 copies small ones, as the library's products take 20 us to begin.
constexpr int64_t kEnough = 64, kFewest = 8, kFewWeights = 1 << 17;

Matrix matrix_of(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), dtype_index(t.scalar_type())};
}

// As a product reads it: with one stride of 1.
Tensor readable(const Tensor& t) { return t.stride(1) == 1 || t.stride(0) == 1 ? t : dense(t); }

Tensor empty_matrix(int64_t rows, int64_t columns, const Tensor& like) {
  const int64_t strides[] = {columns, 1};
  return Cpu::empty_result({rows, columns}, strides, like.scalar_type(), like);
}

Tensor empty_feature_major(int64_t n, int64_t features, const Tensor& like) {
  const int64_t strides[] = {1, n};
  return Cpu::empty_result({n, features}, strides, ScalarType::Float, like);
}

Network network_of(const Tensor& x, const std::vector<Tensor>& weights, const Activation& f, double parameter) {
  Network net;
  net.n = x.size(0);
  net.set_activation(f, parameter);
  net.layers.resize(weights.size());
  for (size_t l = 0; l < weights.size(); ++l) {
    net.layers[l].in = weights[l].size(1);
    net.layers[l].out = weights[l].size(0);
    net.layers[l].weight = static_cast<const float*>(weights[l].const_data_ptr());
  }
  return net;
}

std::vector<Tensor> all_dense(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  result.reserve(tensors.size());
  for (const Tensor& t : tensors) result.push_back(dense(t));
  return result;
}

// Whether the machine multiplies a half type as such, as the library's products do then. Without, those are loops over
// single numbers, up to a hundred times as slow as float32's.
bool multiplies(ScalarType dtype) {
#if defined(__x86_64__)
  static const std::array<bool, 2> found = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool wide = std::string_view(cpu_level()) == "avx512";  // what is forced counts
    const bool bfloat16 = wide && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    const bool half = wide && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);
    return std::array<bool, 2>{bfloat16, half};
  }();
  return found[dtype == ScalarType::Half];
#else
  return true;
#endif
}

bool is_half_type(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

// Whether the level has products of a dtype.
bool has_products(ScalarType dtype) { return level().gemm[dtype_index(dtype)].run != nullptr; }

// Whether what fits is multiplied in float32.
bool widens(ScalarType dtype) { return is_half_type(dtype) && !has_products(dtype); }

Tensor widened(const Tensor& t) { return torch::stable::to(t, ScalarType::Float); }

bool is_float_on_cpu(const Tensor& t) { return t.scalar_type() == ScalarType::Float && t.is_cpu(); }

}  // namespace

bool Cpu::fits(const Tensor& rows, int64_t in, int64_t out) {
  const int64_t n = rows.size(0);
  const ScalarType dtype = rows.scalar_type();
  if (!rows.is_cpu()) return false;
  if (widens(dtype)) return !multiplies(dtype);
  if (!has_products(dtype)) return false;
  return dtype == ScalarType::Float || n >= kEnough || (n >= kFewest && in * out <= kFewWeights);
}

std::tuple<Tensor, Tensor> Cpu::linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
                                       const Activation& f, double parameter) {
  if (widens(x_.scalar_type())) {
    const auto bias = bias_ ? std::optional<Tensor>(widened(*bias_)) : bias_;
    const auto [y, z] = linear(widened(x_), widened(weight_), bias, f, parameter);
    const ScalarType dtype = x_.scalar_type();
    return {torch::stable::to(y, dtype), f.saves_x ? torch::stable::to(z, dtype) : nothing(x_)};
  }
  const Tensor x = readable(x_), weight = readable(weight_);
  const std::optional<Tensor> bias = dense_if_any(bias_);
  const int64_t n = x.size(0), in = weight.size(1), out = weight.size(0);
  const Tensor y = empty_matrix(n, out, x), z = f.saves_x ? empty_matrix(n, out, x) : nothing(x);
  // With few examples it is the weight's rows that are worth reading where they lie.
  const bool by_features = n < kEnough && n <= out && weight.stride(1) == 1 && x.scalar_type() == ScalarType::Float;
  Gemm g = by_features ? product(out, n, in, matrix_of(weight), matrix_of(x).transposed(), matrix_of(y).transposed())
                       : product(n, out, in, matrix_of(x), matrix_of(weight).transposed(), matrix_of(y));
  g.bias = bias ? bias->const_data_ptr() : nullptr;
  g.bias_of_row = by_features;
  g.activation = float_column(f.forward);
  g.parameter = parameter;
  g.z = f.saves_x ? z.mutable_data_ptr() : nullptr;
  gemm(g);
  return {y, z};
}

std::array<Tensor, 3> Cpu::affine_backward(const Tensor& dz_, const std::optional<Tensor>& x,
                                           const std::optional<Tensor>& weight, bool need_x, bool need_weight,
                                           bool need_bias) {
  const ScalarType dtype = dz_.scalar_type();
  if (widens(dtype)) {
    const auto wide = [](const std::optional<Tensor>& t, bool needed) {
      return needed ? std::optional<Tensor>(widened(*t)) : std::nullopt;
    };
    auto result =
        affine_backward(widened(dz_), wide(x, need_weight), wide(weight, need_x), need_x, need_weight, need_bias);
    for (Tensor& t : result) t = torch::stable::to(t, dtype);
    return result;
  }
  const Tensor dz = readable(dz_);
  const int64_t n = dz.size(0), out = dz.size(1);
  const Matrix d = matrix_of(dz);
  const auto multiply = [&](int64_t rows, int64_t k, Matrix a, const Tensor& b_, bool of_parameter) {
    const Tensor b = readable(b_), c = empty_matrix(rows, b.size(1), dz);
    Gemm g = product(rows, b.size(1), k, a, matrix_of(b), matrix_of(c));
    g.of_parameter = of_parameter;
    gemm(g);
    return c;
  };
  std::array<Tensor, 3> result{need_x ? multiply(n, out, d, *weight, false) : nothing(dz),
                               need_weight ? multiply(out, n, d.transposed(), *x, true) : nothing(dz), nothing(dz)};
  if (need_bias) {
    result[2] = empty({out}, dtype, dz);
    sum_rows(d, n, out, result[2].mutable_data_ptr());
  }
  return result;
}

bool Cpu::fits_network(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  if (x.dim() != 2 || !is_float_on_cpu(x)) return false;
  int64_t features = x.size(1);
  for (const Tensor& w : weights) {
    if (w.dim() != 2 || !is_float_on_cpu(w) || w.size(1) != features) return false;
    features = w.size(0);
  }
  for (size_t i = 0; i < biases.size(); ++i)
    if (biases[i].dim() != 1 || !is_float_on_cpu(biases[i]) || biases[i].size(0) != weights[i].size(0)) return false;
  return true;
}

// The layout in which mlp returns what it saves: feature-major.
bool Cpu::fits_saved(const std::vector<Tensor>& saved, int64_t n) {
  for (const Tensor& t : saved)
    if (t.dim() != 2 || !is_float_on_cpu(t) || t.size(0) != n || t.stride(0) != 1 || t.stride(1) != n) return false;
  return true;
}

std::vector<Tensor> Cpu::mlp(const Tensor& x_, const std::vector<Tensor>& weights_, const std::vector<Tensor>& biases_,
                             const Activation& f, double parameter) {
  const Tensor x = readable(x_);
  const std::vector<Tensor> weights = all_dense(weights_), biases = all_dense(biases_);
  Network net = network_of(x, weights, f, parameter);
  std::vector<Tensor> result;
  result.reserve(2 * weights.size());
  result.push_back(empty_matrix(net.n, weights.back().size(0), x));
  for (size_t l = 0; l < weights.size(); ++l) {
    Layer& layer = net.layers[l];
    if (!biases.empty()) layer.bias = static_cast<const float*>(biases[l].const_data_ptr());
    if (l + 1 == weights.size()) break;
    for (float** const kept : {f.saves_x ? &layer.z : nullptr, &layer.h}) {
      if (!kept) continue;
      result.push_back(empty_feature_major(net.n, layer.out, x));
      *kept = floats_of(result.back());
    }
  }
  forward(net, matrix_of(x), matrix_of(result[0]));
  return result;
}

std::vector<Tensor> Cpu::mlp_backward(const Tensor& dy_, const Tensor& x_, const std::vector<Tensor>& weights_,
                                      const std::vector<Tensor>& saved, const Activation& f, double parameter,
                                      bool need_x, const std::vector<int64_t>& need_weights,
                                      const std::vector<int64_t>& need_biases) {
  const Tensor x = readable(x_), dy = readable(dy_);
  const std::vector<Tensor> weights = all_dense(weights_);
  const size_t layers = weights.size(), per_layer = f.saves_x ? 2 : 1;
  Network net = network_of(x, weights, f, parameter);
  std::vector<Gradients> gradients(layers);
  std::vector<Tensor> result;  // in the order of mlp_backward in ops.h
  result.reserve(1 + layers + need_biases.size());
  result.push_back(need_x ? empty_matrix(net.n, x.size(1), x) : nothing(x));
  for (size_t l = 0; l < layers; ++l) {
    Layer& layer = net.layers[l];
    if (l + 1 < layers) {
      if (f.saves_x) layer.z = floats_of(saved[l * per_layer]);
      layer.h = floats_of(saved[l * per_layer + per_layer - 1]);
    }
    result.push_back(need_weights[l] ? empty_matrix(layer.out, layer.in, x) : nothing(x));
    if (need_weights[l]) gradients[l].weight = floats_of(result.back());
  }
  for (size_t l = 0; l < need_biases.size(); ++l) {
    result.push_back(need_biases[l] ? empty({net.layers[l].out}, ScalarType::Float, x) : nothing(x));
    if (need_biases[l]) gradients[l].bias = floats_of(result.back());
  }
  thread_local Scratch kept;
  Scratch own;
  Scratch& scratch = scratch_size(net) > kKept ? own : kept;
  backward(net, matrix_of(x), matrix_of(dy), gradients, need_x ? matrix_of(result[0]) : Matrix{},
           scratch.at_least(static_cast<size_t>(scratch_size(net))));
  return result;
}

}  // namespace torchbp
