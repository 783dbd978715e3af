// The schemas of torchbp's operations, and their CPU kernels.
//
// Python completes them (torchbp/functions/gate.py): fake kernels, vmap rules, and autograd through the Functions.
#include <string>

#include "cpu/backend.h"
#include "ops.h"

namespace torchbp {
namespace {

// name(Tensor x, float alpha) -> Tensor and name_backward(Tensor dy, Tensor saved, float alpha) -> Tensor.
void define_unary(StableLibrary& m, const std::string& name, const std::string& parameter, const std::string& saves) {
  const std::string more = parameter == "none" ? "" : ", float " + parameter;
  const std::string saved = saves == "nothing" ? "" : ", Tensor saved";
  m.def((name + "(Tensor x" + more + ") -> Tensor").c_str());
  m.def((name + "_backward(Tensor dy" + saved + more + ") -> Tensor").c_str());
}

void define_binary(StableLibrary& m, const std::string& name) {
  m.def((name + "(Tensor a, Tensor b) -> Tensor").c_str());
  m.def((name + "_backward(Tensor dy, Tensor a, Tensor b) -> (Tensor, Tensor)").c_str());
  m.def((name + "_backward_a(Tensor dy, Tensor a, Tensor b) -> Tensor").c_str());
  m.def((name + "_backward_b(Tensor dy, Tensor a, Tensor b) -> Tensor").c_str());
}

void define_operations(StableLibrary& m) {
#define ROW(name, parameter, forward, saves, ...) define_unary(m, #name, #parameter, #saves);
  TORCHBP_UNARY_GATES(ROW)
#undef ROW
#define ROW(name, ...) define_binary(m, #name);
  TORCHBP_BINARY_GATES(ROW)
#undef ROW
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, str activation, float parameter) -> (Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor saved, str activation, float parameter, "
      "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("mlp(Tensor x, Tensor[] weights, Tensor[] biases, str activation, float parameter) -> Tensor[]");
  m.def(
      "mlp_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor[] saved, str activation, float parameter, "
      "bool need_x, int[] need_weights, int[] need_biases) -> Tensor[]");
  m.def(
      "softmax_ce(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction, "
      "float label_smoothing) -> (Tensor, Tensor, Tensor)");
  m.def(
      "softmax_ce_backward(Tensor dloss, Tensor input, Tensor target, Tensor? weight, Tensor lse, Tensor total, "
      "int ignore_index, int reduction, float label_smoothing, bool need_input, bool need_target) "
      "-> (Tensor, Tensor)");
  m.def("max_pieces(Tensor z) -> (Tensor, Tensor)");
  m.def("max_pieces_backward(Tensor dy, Tensor index, int pieces) -> Tensor");
  m.def("l2_penalty(Tensor[] tensors) -> Tensor");
  m.def(
      "image_batch(Tensor images, Tensor index, Tensor? flip, Tensor? shift, float[] scale, float[] offset, "
      "ScalarType dtype) -> Tensor");
}

// Images uint8 [N, C, H, W] of any layout, index int64 [n], flip uint8 [n], shift int32 [n, 2] -> [n, C, H, W]: Batch.
// It runs where the bytes are, on the CPU.
Tensor image_batch(const Tensor& images, const Tensor& index_, std::optional<Tensor> flip_,
                   std::optional<Tensor> shift_, std::vector<double> scale, std::vector<double> offset,
                   ScalarType dtype) {
  const char* op = "image_batch";
  const auto check = [&](const char* name, const Tensor& t, ScalarType wanted, const std::vector<int64_t>& shape) {
    STD_TORCH_CHECK(t.scalar_type() == wanted, "torchbp::", op, ": ", name, " wants ScalarType ",
                    static_cast<int>(wanted), ", got ", static_cast<int>(t.scalar_type()));
    check_shape(op, name, t, shape);
    check_device(op, name, t, images);
  };
  STD_TORCH_CHECK(images.dim() == 4, "torchbp::", op, ": images wants shape (N, C, H, W), got ", shape_text(images));
  check("images", images, ScalarType::Byte, sizes_of(images));
  STD_TORCH_CHECK(index_.dim() == 1, "torchbp::", op, ": index wants shape (n), got ", shape_text(index_));
  check("index", index_, ScalarType::Long, sizes_of(index_));
  const Tensor index = dense(index_);
  const auto flip = dense_if_any(flip_), shift = dense_if_any(shift_);
  Batch batch;
  batch.n = index.size(0);
  if (flip) check("flip", *flip, ScalarType::Byte, {batch.n});
  if (shift) check("shift", *shift, ScalarType::Int, {batch.n, 2});
  batch.channels = images.size(1);
  batch.height = images.size(2);
  batch.width = images.size(3);
  STD_TORCH_CHECK(static_cast<int64_t>(scale.size()) == batch.channels && scale.size() == offset.size(),
                  "torchbp::", op, ": scale and offset want ", batch.channels, " numbers each, got ", scale.size(),
                  " and ", offset.size());
  STD_TORCH_CHECK(is_floating(dtype), "torchbp::", op,
                  ": dtype wants float64, float32, bfloat16 or float16, got ScalarType ", static_cast<int>(dtype));
  batch.index = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < batch.n; ++i)
    STD_TORCH_CHECK(batch.index[i] >= 0 && batch.index[i] < images.size(0), "torchbp::", op, ": index[", i, "] is ",
                    batch.index[i], ", out of range for ", images.size(0), " images");
  const Tensor out = empty({batch.n, batch.channels, batch.height, batch.width}, dtype, images);
  if (out.numel() == 0) return out;
  batch.images = static_cast<const uint8_t*>(images.const_data_ptr());
  for (int d = 0; d < 4; ++d) batch.strides[d] = images.stride(d);
  if (flip) batch.flip = static_cast<const uint8_t*>(flip->const_data_ptr());
  if (shift) batch.shift = static_cast<const int32_t*>(shift->const_data_ptr());
  batch.scale = scale.data();
  batch.offset = offset.data();
  batch.out = out.mutable_data_ptr();
  batch.dtype = dtype;
  Cpu::batch(batch);
  return out;
}

}  // namespace
}  // namespace torchbp

STABLE_TORCH_LIBRARY(torchbp, m) { torchbp::define_operations(m); }
STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) {
  torchbp::register_operations<torchbp::Cpu>(m);
  m.impl("image_batch", TORCH_BOX(&torchbp::image_batch));
}
