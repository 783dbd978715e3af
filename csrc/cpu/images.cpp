// image_batch: normalised, mirrored and moved images out of a data set of bytes. It runs where the bytes are, on the CPU.
#include "images.h"

#include <torch/csrc/stable/library.h>

#include "../check.h"
#include "backend.h"

namespace torchbp {
ImageBatch describe_images(const char* op, const Tensor& images, const Tensor& index, const std::optional<Tensor>& flip,
                           const std::optional<Tensor>& shift, std::vector<double> scale, std::vector<double> offset) {
  const auto check = [&](const char* name, const Tensor& t, ScalarType wanted, const std::vector<int64_t>& shape) {
    STD_TORCH_CHECK(t.scalar_type() == wanted, "torchbp::", op, ": ", name, " wants ScalarType ",
                    static_cast<int>(wanted), ", got ", static_cast<int>(t.scalar_type()));
    check_shape(op, name, t, shape);
    check_device(op, name, t, images);
  };
  STD_TORCH_CHECK(images.dim() == 4, "torchbp::", op, ": images wants shape (N, C, H, W), got ", shape_text(images));
  check("images", images, ScalarType::Byte, sizes_of(images));
  STD_TORCH_CHECK(index.dim() == 1, "torchbp::", op, ": index wants shape (n), got ", shape_text(index));
  check("index", index, ScalarType::Long, sizes_of(index));
  ImageBatch result{
      {}, images, dense(index), dense_if_any(flip), dense_if_any(shift), std::move(scale), std::move(offset)};
  Batch& batch = result.batch;
  batch.n = index.size(0);
  if (flip) check("flip", *flip, ScalarType::Byte, {batch.n});
  if (shift) check("shift", *shift, ScalarType::Int, {batch.n, 2});
  batch.channels = images.size(1);
  batch.height = images.size(2);
  batch.width = images.size(3);
  STD_TORCH_CHECK(
      static_cast<int64_t>(result.scale.size()) == batch.channels && result.scale.size() == result.offset.size(),
      "torchbp::", op, ": scale and offset want ", batch.channels, " numbers each, got ", result.scale.size(), " and ",
      result.offset.size());
  batch.index = static_cast<const int64_t*>(result.index.const_data_ptr());
  for (int64_t i = 0; i < batch.n; ++i)
    STD_TORCH_CHECK(batch.index[i] >= 0 && batch.index[i] < images.size(0), "torchbp::", op, ": index[", i, "] is ",
                    batch.index[i], ", out of range for ", images.size(0), " images");
  batch.images = static_cast<const uint8_t*>(images.const_data_ptr());
  for (int d = 0; d < 4; ++d) batch.strides[d] = images.stride(d);
  if (flip) batch.flip = static_cast<const uint8_t*>(result.flip->const_data_ptr());
  if (shift) batch.shift = static_cast<const int32_t*>(result.shift->const_data_ptr());
  batch.scale = result.scale.data();
  batch.offset = result.offset.data();
  return result;
}

namespace {

// Returns [n, C, H, W].
Tensor image_batch(const Tensor& images, const Tensor& index, std::optional<Tensor> flip, std::optional<Tensor> shift,
                   std::vector<double> scale, std::vector<double> offset, ScalarType dtype) {
  STD_TORCH_CHECK(is_floating(dtype), "torchbp::image_batch: dtype wants float64, float32, bfloat16 or float16, got ",
                  "ScalarType ", static_cast<int>(dtype));
  ImageBatch described =
      describe_images("image_batch", images, index, flip, shift, std::move(scale), std::move(offset));
  Batch& batch = described.batch;
  const Tensor out = empty({batch.n, batch.channels, batch.height, batch.width}, dtype, images);
  if (out.numel() == 0) return out;
  batch.out = out.mutable_data_ptr();
  batch.dtype = dtype;
  Cpu::batch(batch);
  return out;
}

}  // namespace
}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp, CPU, m) { m.impl("image_batch", TORCH_BOX(&torchbp::image_batch)); }
