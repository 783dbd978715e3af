// Bytes of images to normalised numbers, for the level at hand: the rows of a Batch (../batch.h).
#pragma once

#include "../batch.h"
#include "../dtype.h"

namespace torchbp::TORCHBP_LEVEL {

// `rows` rows of bytes, one after another; a step of -1 mirrors them.
inline void copy_rows(const uint8_t* from, int64_t row_stride, int64_t step, uint8_t* to, int64_t rows, int64_t width) {
  for (int64_t y = 0; y < rows; ++y, from += row_stride, to += width) {
    if (step == -1)
      for (int64_t x = 0; x < width; ++x) to[x] = from[-x];
    else
      for (int64_t x = 0; x < width; ++x) to[x] = from[x * step];
  }
}

// Zeros in `columns` neighbouring columns. The size of a store is a constant, as a call of memset would cost more than
// the rest of a row.
template <int columns, class T>
void zero_columns(T* to, int64_t rows, int64_t width) {
  for (int64_t y = 0; y < rows; ++y) std::memset(to + y * width, 0, columns * sizeof(T));
}

// One channel of one image. A move of a contiguous plane is one run from one place to another: what that carries over
// the ends of rows lies where the zeros have to be.
//
//     1 2 3 4        . 1 2 3        0 1 2 3
//     5 6 7 8   ->   4 5 6 7   ->   0 5 6 7
//     9 a b c        8 9 a b        0 9 a b
//
// So the loop that has to vectorise is long however narrow the image, and knows nothing of moves. What is mirrored, or
// not contiguous, is copied to `scratch` first, as bytes that stay in L1.
template <class T>
void plane(const Batch& b, const uint8_t* from, T* to, bool flip, int64_t down, int64_t right, Compute<T> scale,
           Compute<T> offset, uint8_t* scratch) {
  const int64_t height = b.height, width = b.width;
  // What of the result shows the image: rows [top, bottom), columns [left, end).
  const int64_t top = std::max<int64_t>(down, 0), bottom = height + std::min<int64_t>(down, 0);
  const int64_t left = std::max<int64_t>(right, 0), end = width + std::min<int64_t>(right, 0);
  if (top >= bottom || left >= end) {
    std::memset(to, 0, height * width * sizeof(T));
    return;
  }
  const int64_t rows = bottom - top, row_stride = b.strides[2], step = b.strides[3];
  from += (top - down) * row_stride;
  if (flip || step != 1 || row_stride != width) {
    copy_rows(flip ? from + (width - 1) * step : from, row_stride, flip ? -step : step, scratch, rows, width);
    from = scratch;
  }
  from += left - right;
  const int64_t gap = width - (end - left), start = top * width + left, length = rows * width - gap;
  T* const run = to + start;
#pragma GCC ivdep
  for (int64_t i = 0; i < length; ++i) store(run + i, from[i] * scale + offset);
  std::memset(to, 0, start * sizeof(T));
  std::memset(run + length, 0, (height * width - start - length) * sizeof(T));
  T* zero = run + width - gap;
  for (int64_t x = gap; x >= 4; x -= 4, zero += 4) zero_columns<4>(zero, rows - 1, width);
  if (gap & 2) zero_columns<2>(zero, rows - 1, width);
  if (gap & 1) zero_columns<1>(zero + (gap & 2), rows - 1, width);
}

// scratch: height * width bytes that no other thread uses.
template <class T>
void batch_rows(const Batch& b, int64_t begin, int64_t end, uint8_t* scratch) {
  using C = Compute<T>;
  const int64_t area = b.height * b.width;
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t* const image = b.images + b.index[i] * b.strides[0];
    const uint8_t* const next = b.images + b.index[std::min(i + 1, end - 1)] * b.strides[0];
    const bool flip = b.flip && b.flip[i];
    const int64_t down = b.shift ? b.shift[2 * i] : 0, right = b.shift ? b.shift[2 * i + 1] : 0;
    T* const out = static_cast<T*>(b.out) + i * b.channels * area;
    for (int64_t c = 0; c < b.channels; ++c) {
      // Shuffled images lie anywhere in memory: the next is fetched while this one is worked on, a channel at a time,
      // as more lines than a core has on order at once would hold up everything else.
      for (int64_t k = 0; k < area; k += 64) __builtin_prefetch(next + c * area + k);
      plane(b, image + c * b.strides[1], out + c * area, flip, down, right, static_cast<C>(b.scale[c]),
            static_cast<C>(b.offset[c]), scratch);
    }
  }
}

}  // namespace torchbp::TORCHBP_LEVEL
