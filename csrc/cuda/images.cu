// Batches of normalised, mirrored and moved images, made where the bytes are, on a GPU: the rows of a Batch (../batch.h).
#include <torch/csrc/stable/library.h>

#define TORCHBP_LEVEL cuda
#include "../images.h"
#include "launch.h"

namespace torchbp {
namespace cuda {
namespace {

// Pixels `pack` at a time, which divides the width. An index beyond the `images` gives nan: nobody waits here to raise.
template <class T, int pack>
__global__ void __launch_bounds__(kThreads) fill(const __grid_constant__ Batch b, int64_t images) {
  using C = Compute<T>;
  const int64_t columns = b.width / pack, items = b.n * b.channels * b.height * columns;
  for (int64_t item = thread_index(); item < items; item += thread_count()) {
    const int64_t row_of_all = item / columns, plane = row_of_all / b.height;
    const int64_t i = plane / b.channels, c = plane % b.channels;
    const int64_t image = b.index[i];
    const bool known = image >= 0 && image < images, flip = b.flip && b.flip[i];
    // Where in the image this comes from.
    const int64_t y = row_of_all % b.height - (b.shift ? b.shift[2 * i] : 0);
    const int64_t first = item % columns * pack - (b.shift ? b.shift[2 * i + 1] : 0);
    const C scale = static_cast<C>(b.scale[c]), offset = static_cast<C>(b.offset[c]);
    Pack<T, pack> pixels;
#pragma unroll
    for (int k = 0; k < pack; ++k) {
      const int64_t x = flip ? b.width - 1 - (first + k) : first + k;
      C value = known ? C(0) : std::numeric_limits<C>::quiet_NaN();
      if (known && y >= 0 && y < b.height && x >= 0 && x < b.width)
        value =
            b.images[image * b.strides[0] + c * b.strides[1] + y * b.strides[2] + x * b.strides[3]] * scale + offset;
      store(&pixels.value[k], value);
    }
    static_cast<Pack<T, pack>*>(b.out)[item] = pixels;
  }
}

// [n, C, H, W] of `dtype`: images[index] as byte * affine[0, c] + affine[1, c], mirrored and moved.
Tensor batch(const Tensor& images, const Tensor& index_, std::optional<Tensor> flip_, std::optional<Tensor> shift_,
             const Tensor& affine_, ScalarType dtype) {
  check_dtype_of_batch(dtype);
  const Tensor index = dense(index_), affine = dense(affine_);
  const auto flip = dense_if_any(flip_), shift = dense_if_any(shift_);
  Batch b = describe_batch(images, index, flip, shift);
  check_beside(images, "affine", affine, ScalarType::Double, {2, b.channels});
  b.scale = static_cast<const double*>(affine.const_data_ptr());
  b.offset = b.scale + b.channels;
  const Tensor out = empty({b.n, b.channels, b.height, b.width}, dtype, images);
  if (out.numel() == 0) return out;
  b.out = out.mutable_data_ptr();
  const Launch launch("images", images.get_device_index());
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int pack = 4;
    if (b.width % pack == 0)
      launch(fill<T, pack>, blocks_for(out.numel() / pack, kThreads), kThreads, b, images.size(0));
    else
      launch(fill<T, 1>, blocks_for(out.numel(), kThreads), kThreads, b, images.size(0));
  });
  return out;
}

}  // namespace
}  // namespace cuda
}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp_images, CUDA, m) { m.impl("on_gpu", TORCH_BOX(&torchbp::cuda::batch)); }
