// The tensors that describe batches of images, checked once for the operation that makes one batch (images.cpp) and for
// the trainer that makes an epoch of them (train.cpp).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../batch.h"

namespace torchbp {

// Keeps alive what its Batch points to.
struct ImageBatch {
  Batch batch;  // all but `out` and `dtype`
  torch::stable::Tensor images, index;
  std::optional<torch::stable::Tensor> flip, shift;
  std::vector<double> scale, offset;
};

// images uint8 [N, C, H, W] of any layout, index int64 [n], flip uint8 [n], shift int32 [n, 2], scale and offset [C].
ImageBatch describe_images(const char* op, const torch::stable::Tensor& images, const torch::stable::Tensor& index,
                           const std::optional<torch::stable::Tensor>& flip,
                           const std::optional<torch::stable::Tensor>& shift, std::vector<double> scale,
                           std::vector<double> offset);

}  // namespace torchbp
