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

#if defined(__x86_64__) && TORCHBP_VECTOR > 16
#define TORCHBP_VECTORS_OF_HALVES

// A vector of a half type at a time, with what AVX2 and AVX-512 have for it: of float16 in a tenth of the time that the
// arithmetic above takes. That stays for loops over single numbers, as the compiler makes vectors of it.
constexpr int64_t kFloats = TORCHBP_VECTOR / sizeof(float);
typedef float Floats __attribute__((vector_size(TORCHBP_VECTOR)));
typedef uint32_t Words32 __attribute__((vector_size(TORCHBP_VECTOR)));
typedef uint16_t Words16 __attribute__((vector_size(TORCHBP_VECTOR / 2)));

TORCHBP_INLINE Words32 nearest_bfloat16(Floats x) {
  const Words32 w = (Words32)x, nearest_even = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;
  return x == x ? nearest_even : Words32{} + 0x7FC0u;
}
#if TORCHBP_VECTOR == 64
TORCHBP_INLINE Floats widened(Words16 x, BFloat16) { return (Floats)(__builtin_convertvector(x, Words32) << 16); }
TORCHBP_INLINE Floats widened(Words16 x, Half) { return (Floats)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)x); }
TORCHBP_INLINE Words16 narrowed(Floats x, BFloat16) { return __builtin_convertvector(nearest_bfloat16(x), Words16); }
TORCHBP_INLINE Words16 narrowed(Floats x, Half) {
  return (Words16)_mm512_maskz_cvtps_ph(0xFFFF, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#else
TORCHBP_INLINE Floats widened(Words16 x, BFloat16) {
  return (Floats)((Words32)_mm256_cvtepu16_epi32((__m128i)x) << 16);
}
TORCHBP_INLINE Floats widened(Words16 x, Half) { return (Floats)_mm256_cvtph_ps((__m128i)x); }
TORCHBP_INLINE Words16 narrowed(Floats x, BFloat16) {
  const __m256i w = (__m256i)nearest_bfloat16(x);
  return (Words16)_mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
}
TORCHBP_INLINE Words16 narrowed(Floats x, Half) {
  return (Words16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
}
#endif

#endif

// Many at once. The two may be the same memory, but not overlap otherwise.
template <class T>
TORCHBP_INLINE void load_n(Compute<T>* to, const T* from, int64_t n) {
  int64_t i = 0;
#if defined(TORCHBP_VECTORS_OF_HALVES)
  if constexpr (!std::is_same_v<T, Compute<T>>)
    for (; i + kFloats <= n; i += kFloats) {
      Words16 x;
      memcpy(&x, from + i, sizeof(x));
      const Floats y = widened(x, T());
      memcpy(to + i, &y, sizeof(y));
    }
#endif
#pragma GCC ivdep
  for (; i < n; ++i) to[i] = load(from[i]);
}
template <class T>
TORCHBP_INLINE void store_n(T* to, const Compute<T>* from, int64_t n) {
  int64_t i = 0;
#if defined(TORCHBP_VECTORS_OF_HALVES)
  if constexpr (!std::is_same_v<T, Compute<T>>)
    for (; i + kFloats <= n; i += kFloats) {
      Floats x;
      memcpy(&x, from + i, sizeof(x));
      const Words16 y = narrowed(x, T());
      memcpy(to + i, &y, sizeof(y));
    }
#endif
#pragma GCC ivdep
  for (; i < n; ++i) store(to + i, from[i]);
}
#undef TORCHBP_VECTORS_OF_HALVES

}  // namespace torchbp::TORCHBP_LEVEL
