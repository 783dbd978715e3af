// A batch of normalised images out of a data set of bytes: what to read, how to change it, where to write it.
//
// A plain struct over raw pointers, so that a whole epoch can run from C++ without a tensor for each batch. The kernels
// are cpu/batch.h, which Cpu::batch (cpu/backend.h) runs with threads, and cuda/images.cu.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace torchbp {

// Row i of `out` is image index[i], mirrored left to right where flip[i], then moved by shift[i], each pixel as
// byte * scale[c] + offset[c]; what a move brings in is exactly 0. Nothing is checked: an index has to lie in the data
// set. A shift may be any; one beyond the image leaves nothing of it.
struct Batch {
  const uint8_t* images = nullptr;
  int64_t channels = 0, height = 0, width = 0;
  int64_t strides[4] = {};         // bytes from one image, channel, row, pixel to the next
  const int64_t* index = nullptr;  // [n]
  const uint8_t* flip = nullptr;   // [n], or null for none
  const int32_t* shift = nullptr;  // [n, 2]: pixels down, right; or null for none
  const double* scale = nullptr;   // [channels]; in float64 for a float64 `out`, else rounded to float32
  const double* offset = nullptr;  // [channels], likewise
  int64_t n = 0;
  void* out = nullptr;  // [n, channels, height, width], contiguous
  torch::headeronly::ScalarType dtype = torch::headeronly::ScalarType::Float;  // of `out`

  // Rows [begin, end) alone, to be written to the start of `out`.
  Batch rows(int64_t begin, int64_t end) const {
    Batch part = *this;
    part.index += begin;
    if (flip) part.flip += begin;
    if (shift) part.shift += 2 * begin;
    part.n = end - begin;
    return part;
  }
};

}  // namespace torchbp
