// Tensors whose memory, once they are gone, is kept for the next of their size.
#pragma once

#include "../check.h"

namespace torchbp {

// As `empty_strided`, for tensors on the CPU. From `least` bytes on their memory is kept, and like NumPy's cannot grow:
// `resize_` refuses.
Tensor empty_in_block(Sizes sizes, const int64_t* strides, ScalarType dtype, const Tensor& like, size_t least);

// Gives what is kept back to the system.
void empty_cache();

}  // namespace torchbp
