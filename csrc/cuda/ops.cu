// The operations of ops.h on CUDA: torchbp/_cuda.so registers them when it is loaded.
#include "../ops.h"
#include "../optim_ops.h"

#include "backend.h"

STABLE_TORCH_LIBRARY_IMPL(torchbp, CUDA, m) {
  torchbp::register_operations<torchbp::Cuda>(m);
  torchbp::register_optimizers<torchbp::Cuda>(m);
}
STABLE_TORCH_LIBRARY_IMPL(torchbp_kernels, CUDA, m) { torchbp::register_operations<torchbp::Cuda>(m); }
