// What the operations that make batches of images take, checked and described once for every device.
#pragma once

#include <optional>

#include "batch.h"
#include "check.h"

namespace torchbp {

inline void check_dtype_of_batch(ScalarType dtype) {
  STD_TORCH_CHECK(is_floating(dtype), "torchbp::images: dtype wants float64, float32, bfloat16 or float16, got ",
                  "ScalarType ", static_cast<int>(dtype));
}

// That an argument has its dtype, its shape, and the device of the images.
inline void check_beside(const Tensor& images, const char* name, const Tensor& t, ScalarType wanted, Sizes shape) {
  STD_TORCH_CHECK(t.scalar_type() == wanted, "torchbp::images: ", name, " wants ScalarType ", static_cast<int>(wanted),
                  ", got ", static_cast<int>(t.scalar_type()));
  check_shape("images", name, t, shape);
  check_device("images", name, t, images);
}

// The batch of all of `index`: what to read and how to change it. All but the images are contiguous.
inline Batch describe_batch(const Tensor& images, const Tensor& index, const std::optional<Tensor>& flip,
                            const std::optional<Tensor>& shift) {
  STD_TORCH_CHECK(images.dim() == 4, "torchbp::images: images wants shape (N, C, H, W), got ", shape_text(images));
  check_beside(images, "images", images, ScalarType::Byte, images.sizes());
  STD_TORCH_CHECK(index.dim() == 1, "torchbp::images: index wants shape (n), got ", shape_text(index));
  check_beside(images, "index", index, ScalarType::Long, index.sizes());
  Batch batch;
  batch.n = index.size(0);
  if (flip) check_beside(images, "flip", *flip, ScalarType::Byte, {batch.n});
  if (shift) check_beside(images, "shift", *shift, ScalarType::Int, {batch.n, 2});
  batch.channels = images.size(1);
  batch.height = images.size(2);
  batch.width = images.size(3);
  batch.images = static_cast<const uint8_t*>(images.const_data_ptr());
  for (int d = 0; d < 4; ++d) batch.strides[d] = images.stride(d);
  batch.index = static_cast<const int64_t*>(index.const_data_ptr());
  if (flip) batch.flip = static_cast<const uint8_t*>(flip->const_data_ptr());
  if (shift) batch.shift = static_cast<const int32_t*>(shift->const_data_ptr());
  return batch;
}

}  // namespace torchbp
