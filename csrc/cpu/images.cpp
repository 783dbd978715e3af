// Batches of normalised, mirrored and moved images out of a data set of bytes. They are made where the bytes are: here on
// the CPU.
//
// open takes the plan of an epoch and returns its number; batch then makes a batch of it in one call of two numbers. A
// call of PyTorch from Python takes microseconds, more of them the more arguments it has and after a kernel that has
// filled the caches; the kernel takes 50.
#include "images.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../handles.h"
#include "../images.h"
#include "backend.h"
#include "blocks.h"

namespace torchbp {
namespace {

constexpr const char* kOp = "images";

Handles<const Images> opened(kOp);

}  // namespace

std::shared_ptr<const Images> images_of(int64_t number) { return opened.at(number); }

Batch Images::rows(int64_t begin, int64_t end) const {
  Batch batch = describe_batch(images, index, flip, shift);
  check_beside(images, "targets", targets, ScalarType::Long, {batch.n});
  STD_TORCH_CHECK(static_cast<int64_t>(scale.size()) == batch.channels && scale.size() == offset.size(),
                  "torchbp::", kOp, ": scale and offset want ", batch.channels, " numbers each, got ", scale.size(),
                  " and ", offset.size());
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= batch.n, "torchbp::", kOp, ": begin wants 0 to ", batch.n,
                  ", got ", begin);
  for (int64_t i = begin; i < end; ++i)
    STD_TORCH_CHECK(batch.index[i] >= 0 && batch.index[i] < images.size(0), "torchbp::", kOp, ": index[", i, "] is ",
                    batch.index[i], ", out of range for ", images.size(0), " images");
  batch.scale = scale.data();
  batch.offset = offset.data();
  batch.dtype = dtype;
  return batch.rows(begin, end);
}

namespace {

int64_t open(const Tensor& images, const Tensor& index, std::optional<Tensor> flip, std::optional<Tensor> shift,
             const Tensor& targets, std::vector<double> scale, std::vector<double> offset, ScalarType dtype,
             int64_t batch_size, bool flatten) {
  check_dtype_of_batch(dtype);
  STD_TORCH_CHECK(batch_size >= 1, "torchbp::", kOp, ": batch_size wants at least 1, got ", batch_size);
  const auto all = std::make_shared<const Images>(Images{images, dense(index), dense_if_any(flip), dense_if_any(shift),
                                                         dense(targets), std::move(scale), std::move(offset), dtype,
                                                         batch_size, flatten});
  all->rows(0, all->index.dim() == 1 ? all->size() : 0);
  return opened.open(all);
}

// The batch that begins at a row: [B, C, H, W] or, flattened, [B, C H W]; and a copy of its targets.
std::tuple<Tensor, Tensor> batch(int64_t number, int64_t begin) {
  const auto all = images_of(number);
  const int64_t end = begin + std::min(all->batch_size, std::max<int64_t>(all->size() - begin, 0));
  Batch rows = all->rows(begin, end);
  const Tensor target = empty({rows.n}, ScalarType::Long, all->targets);
  std::copy_n(all->target() + begin, rows.n, static_cast<int64_t*>(target.mutable_data_ptr()));
  const std::vector<int64_t> shape = all->flatten
                                         ? std::vector<int64_t>{rows.n, rows.channels * rows.height * rows.width}
                                         : std::vector<int64_t>{rows.n, rows.channels, rows.height, rows.width};
  const Tensor out = empty_in_block(shape, contiguous_strides(shape).data(), all->dtype, all->images, 128 << 10);
  if (out.numel() > 0) {
    rows.out = out.mutable_data_ptr();
    Cpu::batch(rows);
  }
  return {out, target};
}

void close(int64_t number) { opened.close(number); }

}  // namespace
}  // namespace torchbp

// A library of its own: torch.ops.torchbp has functions of their arguments alone, which can be traced and batched.
STABLE_TORCH_LIBRARY(torchbp_images, m) {
  m.def(
      "open(Tensor images, Tensor index, Tensor? flip, Tensor? shift, Tensor targets, float[] scale, float[] offset, "
      "ScalarType dtype, int batch_size, bool flatten) -> int");
  m.def("batch(int images, int begin) -> (Tensor, Tensor)");
  m.def("close(int images) -> ()");
  m.def(  // cuda/images.cu
      "on_gpu(Tensor images, Tensor index, Tensor? flip, Tensor? shift, Tensor affine, ScalarType dtype) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchbp_images, CPU, m) { m.impl("open", TORCH_BOX(&torchbp::open)); }
STABLE_TORCH_LIBRARY_IMPL(torchbp_images, CompositeExplicitAutograd, m) {
  m.impl("batch", TORCH_BOX(&torchbp::batch));
  m.impl("close", TORCH_BOX(&torchbp::close));
}
