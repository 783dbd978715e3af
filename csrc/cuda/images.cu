// Batches of normalised, mirrored and moved images, made where the bytes are, on a GPU: the rows of a Batch (../batch.h).
#include <torch/csrc/stable/library.h>

#define TORCHBP_LEVEL cuda
#include "../batch.h"
#include "../check.h"
#include "launch.h"

namespace torchbp {
namespace cuda {
namespace {

constexpr const char* kOp = "images";
constexpr int kThreads = 256;

// What a thread writes at once.
template <class T, int n>
struct alignas(n * sizeof(T)) Pixels {
  T value[n];
};

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
    Pixels<T, pack> pixels;
#pragma unroll
    for (int k = 0; k < pack; ++k) {
      const int64_t x = flip ? b.width - 1 - (first + k) : first + k;
      C value = known ? C(0) : std::numeric_limits<C>::quiet_NaN();
      if (known && y >= 0 && y < b.height && x >= 0 && x < b.width)
        value =
            b.images[image * b.strides[0] + c * b.strides[1] + y * b.strides[2] + x * b.strides[3]] * scale + offset;
      store(&pixels.value[k], value);
    }
    static_cast<Pixels<T, pack>*>(b.out)[item] = pixels;
  }
}

// [n, C, H, W] of `dtype`: images[index] as byte * affine[0, c] + affine[1, c], mirrored and moved.
Tensor batch(const Tensor& images, const Tensor& index_, std::optional<Tensor> flip_, std::optional<Tensor> shift_,
             const Tensor& affine_, ScalarType dtype) {
  STD_TORCH_CHECK(images.dim() == 4, "torchbp::", kOp, ": images wants shape (N, C, H, W), got ", shape_text(images));
  STD_TORCH_CHECK(index_.dim() == 1, "torchbp::", kOp, ": index wants shape (n), got ", shape_text(index_));
  STD_TORCH_CHECK(is_floating(dtype), "torchbp::", kOp, ": dtype wants float64, float32, bfloat16 or float16, got ",
                  "ScalarType ", static_cast<int>(dtype));
  const Tensor index = dense(index_), affine = dense(affine_);
  const auto flip = dense_if_any(flip_), shift = dense_if_any(shift_);
  const auto check = [&](const char* name, const Tensor& t, ScalarType wanted, Sizes shape) {
    STD_TORCH_CHECK(t.scalar_type() == wanted, "torchbp::", kOp, ": ", name, " wants ScalarType ",
                    static_cast<int>(wanted), ", got ", static_cast<int>(t.scalar_type()));
    check_shape(kOp, name, t, shape);
    check_device(kOp, name, t, images);
  };
  Batch b;
  b.n = index.size(0);
  b.channels = images.size(1);
  b.height = images.size(2);
  b.width = images.size(3);
  check("images", images, ScalarType::Byte, images.sizes());
  check("index", index, ScalarType::Long, index.sizes());
  if (flip) check("flip", *flip, ScalarType::Byte, {b.n});
  if (shift) check("shift", *shift, ScalarType::Int, {b.n, 2});
  check("affine", affine, ScalarType::Double, {2, b.channels});
  for (int d = 0; d < 4; ++d) b.strides[d] = images.stride(d);
  b.images = static_cast<const uint8_t*>(images.const_data_ptr());
  b.index = static_cast<const int64_t*>(index.const_data_ptr());
  if (flip) b.flip = static_cast<const uint8_t*>(flip->const_data_ptr());
  if (shift) b.shift = static_cast<const int32_t*>(shift->const_data_ptr());
  b.scale = static_cast<const double*>(affine.const_data_ptr());
  b.offset = b.scale + b.channels;
  const Tensor out = empty({b.n, b.channels, b.height, b.width}, dtype, images);
  if (out.numel() == 0) return out;
  b.out = out.mutable_data_ptr();
  const Launch launch(kOp, images.get_device_index());
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
