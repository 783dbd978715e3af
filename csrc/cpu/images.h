// An epoch of images: which of a data set of bytes in what order, mirrored and moved how, and what class each has.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "../batch.h"
#include "../check.h"

namespace torchbp {

struct Images {
  Tensor images;                      // uint8 [N, C, H, W], of any layout
  Tensor index;                       // int64 [n]
  std::optional<Tensor> flip;         // uint8 [n]
  std::optional<Tensor> shift;        // int32 [n, 2]
  Tensor targets;                     // int64 [n]
  std::vector<double> scale, offset;  // [C]
  ScalarType dtype;                   // of a batch
  int64_t batch_size;
  bool flatten;

  // Rows [begin, end): all of a Batch but `out`. Everything is checked, and looked up in the tensors, in every call.
  Batch rows(int64_t begin, int64_t end) const;

  int64_t size() const { return index.size(0); }
  const int64_t* target() const { return static_cast<const int64_t*>(targets.const_data_ptr()); }
};

std::shared_ptr<const Images> images_of(int64_t number);

}  // namespace torchbp
