// Tensors whose memory, once they are gone, is kept for the next of their size: for results that come one after the
// other, as batches do.
#pragma once

#include "../check.h"

namespace torchbp {

// As `empty`, for tensors on the CPU.
Tensor empty_in_block(Sizes sizes, ScalarType dtype, const Tensor& like);

}  // namespace torchbp
