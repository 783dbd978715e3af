// Bytes of images to normalised numbers, for the level at hand: the rows of a Batch (../batch.h).
#pragma once

#include "../batch.h"
#include "../dtype.h"

namespace torchbp::TORCHBP_LEVEL {

constexpr int kPixels = 16;  // that are worked on at once

#if TORCHBP_VECTOR == 32
// Eight bytes, one after the other or backwards, as numbers. For AVX2, in the one instruction that it has for this: left
// to itself g++ takes the bytes apart one by one, and vectors that are widened step by step it takes apart in halves.
template <class C, bool backwards>
TORCHBP_INLINE void eight_pixels(const uint8_t* from, C scale, C offset, C* to) {
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef C Numbers __attribute__((vector_size(8 * sizeof(C))));
  int64_t bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  if constexpr (backwards) bytes = __builtin_bswap64(bytes);
  const Ints ints = (Ints)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
  const Numbers numbers = __builtin_convertvector(ints, Numbers) * scale + offset;
  std::memcpy(to, &numbers, sizeof(numbers));
}
#endif

// `pixels` of a row, `step` bytes apart; 1 and -1, which mirrors, are known where this is compiled.
template <int pixels, int known, class T>
TORCHBP_INLINE void normalise(const uint8_t* from, int64_t step, Compute<T> scale, Compute<T> offset, T* to) {
  Compute<T> numbers[pixels];
#if TORCHBP_VECTOR == 32
  if constexpr (known != 0) {
    for (int x = 0; x < pixels; x += 8)
      eight_pixels<Compute<T>, known == -1>(known == -1 ? from - x - 7 : from + x, scale, offset, numbers + x);
    return store_n(to, numbers, pixels);
  }
#endif
  uint8_t bytes[pixels];
  if constexpr (known == -1) {
    uint8_t mirrored[pixels];
    std::memcpy(mirrored, from - (pixels - 1), pixels);
    for (int x = 0; x < pixels; ++x) bytes[x] = mirrored[pixels - 1 - x];
  } else if constexpr (known == 1) {
    std::memcpy(bytes, from, pixels);
  } else {
    for (int x = 0; x < pixels; ++x) bytes[x] = from[x * step];
  }
  for (int x = 0; x < pixels; ++x) numbers[x] = bytes[x] * scale + offset;
  store_n(to, numbers, pixels);
}

// The last pixels overlap those before where kPixels does not divide the row.
template <int known, class T>
void normalise_rows(const uint8_t* from, int64_t row_stride, int64_t step, int64_t rows, int64_t columns, int64_t width,
                    Compute<T> scale, Compute<T> offset, T* to) {
  if (known) step = known;
  const int64_t last = columns - kPixels;
  for (int64_t y = 0; y < rows; ++y, from += row_stride, to += width) {
    if (last >= 0) {
      for (int64_t x = 0; x < last; x += kPixels)
        normalise<kPixels, known>(from + x * step, step, scale, offset, to + x);
      normalise<kPixels, known>(from + last * step, step, scale, offset, to + last);
    } else {
      for (int64_t x = 0; x < columns; ++x) normalise<1, 0>(from + x * step, step, scale, offset, to + x);
    }
  }
}

// Zeros in the first and the last columns, and maybe beyond, in a row that is to be written.
template <class T>
TORCHBP_INLINE void zero_ends(T* row, int64_t width) {
  if (width >= kPixels) {
    std::memset(row, 0, kPixels * sizeof(T));
    std::memset(row + width - kPixels, 0, kPixels * sizeof(T));
  } else {
    std::memset(row, 0, width * sizeof(T));
  }
}

// One channel of one image.
template <class T>
void plane(const Batch& b, const uint8_t* from, T* to, bool flip, int64_t down, int64_t right, Compute<T> scale,
           Compute<T> offset) {
  const int64_t height = b.height, width = b.width;
  // What of the result shows the image: rows [top, bottom), columns [left, end).
  const int64_t top = std::max<int64_t>(down, 0), bottom = height + std::min<int64_t>(down, 0);
  const int64_t left = std::max<int64_t>(right, 0), end = width + std::min<int64_t>(right, 0);
  if (top >= bottom || left >= end) {
    std::memset(to, 0, height * width * sizeof(T));
    return;
  }
  const int64_t row_stride = b.strides[2], step = flip ? -b.strides[3] : b.strides[3];
  from += (top - down) * row_stride + (flip ? (width - 1) * b.strides[3] : 0) + (left - right) * step;
  int64_t rows = bottom - top, columns = end - left;
  T* const first = to + top * width;
  if (columns < width) {
    if (width - columns > kPixels)
      std::memset(first, 0, rows * width * sizeof(T));
    else
      for (int64_t y = 0; y < rows; ++y) zero_ends(first + y * width, width);
  } else if (step == 1 && row_stride == width) {  // all in one row
    columns *= rows;
    rows = 1;
  }
  const auto run = step == 1 ? normalise_rows<1, T> : step == -1 ? normalise_rows<-1, T> : normalise_rows<0, T>;
  run(from, row_stride, step, rows, columns, width, scale, offset, first + left);
  std::memset(to, 0, top * width * sizeof(T));
  std::memset(to + bottom * width, 0, (height - bottom) * width * sizeof(T));
}

template <class T>
void batch_rows(const Batch& b, int64_t begin, int64_t end) {
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
      // as more lines than a core has on order at once would hold up everything else; and to L2, as what waits to enter
      // L1 would hold up the stores (a fifth of the time).
      for (int64_t k = 0; k < area; k += 64) __builtin_prefetch(next + c * area + k, 0, 2);
      plane(b, image + c * b.strides[1], out + c * area, flip, down, right, static_cast<C>(b.scale[c]),
            static_cast<C>(b.offset[c]));
    }
  }
}

}  // namespace torchbp::TORCHBP_LEVEL
