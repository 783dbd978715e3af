// Between memory and arithmetic: half types are kept in 16 bits and computed in float32. Like math.h, one copy for each
// SIMD level and one for CUDA.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "math.h"

namespace torchbp::TORCHBP_LEVEL {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

TORCHBP_INLINE float load(float x) { return x; }
TORCHBP_INLINE double load(double x) { return x; }
TORCHBP_INLINE void store(float* p, float x) { *p = x; }
TORCHBP_INLINE void store(double* p, double x) { *p = x; }

#if defined(__CUDACC__)

TORCHBP_INLINE float load(BFloat16 x) { return x; }
TORCHBP_INLINE float load(Half x) { return x; }
TORCHBP_INLINE void store(BFloat16* p, float x) { *p = x; }
TORCHBP_INLINE void store(Half* p, float x) { *p = x; }

#else

TORCHBP_INLINE float load(BFloat16 x) { return bits<float>(static_cast<uint32_t>(x.x) << 16); }
TORCHBP_INLINE float load(Half h) {
  // Shift exponent and mantissa into place and rescale by 2^-112; subnormals come right through the subtraction of a
  // magic number (the method of Maratyszcza's FP16 library). Branch-free, so that it vectorises.
  const uint32_t w = static_cast<uint32_t>(h.x) << 16;
  const uint32_t sign = w & 0x80000000u, twice = w + w;
  const float normal = bits<float>((twice >> 4) + 0x70000000u) * 0x1.0p-112f;
  const float subnormal = bits<float>((twice >> 17) | 0x3F000000u) - 0.5f;
  return bits<float>(sign | bits<uint32_t>(twice < 0x08000000u ? subnormal : normal));
}
TORCHBP_INLINE void store(BFloat16* p, float x) {
  const uint32_t w = bits<uint32_t>(x);
  const uint32_t nearest_even = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;
  p->x = static_cast<uint16_t>(x != x ? 0x7FC0u : nearest_even);
}
TORCHBP_INLINE void store(Half* p, float x) {
  // Scaling up rounds to infinity beyond the range; adding a power of two rounds to the half format's precision.
  const uint32_t w = bits<uint32_t>(x), twice = w + w;
  const uint32_t exponent = twice & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const float base = (std::abs(x) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t rounded = bits<uint32_t>(bits<float>((bias >> 1) + 0x07800000u) + base);
  const uint32_t value = ((rounded >> 13) & 0x7C00u) + (rounded & 0x0FFFu);
  p->x = static_cast<uint16_t>(((w & 0x80000000u) >> 16) | (twice > 0xFF000000u ? 0x7E00u : value));
}

#endif

// The type that a dtype computes in.
template <class T>
using Compute = decltype(load(T()));

// Many at once. The two may be the same memory, but not overlap otherwise.
template <class T>
TORCHBP_INLINE void load_n(Compute<T>* to, const T* from, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}
template <class T>
TORCHBP_INLINE void store_n(T* to, const Compute<T>* from, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) store(to + i, from[i]);
}

}  // namespace torchbp::TORCHBP_LEVEL
