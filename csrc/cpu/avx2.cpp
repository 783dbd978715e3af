// The CPU kernels for machines with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "system.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define TORCHBP_LEVEL avx2
#define TORCHBP_VECTOR 32
#include "level.h"

const torchbp::Level& torchbp::avx2_level() {
  static const Level level = avx2::make_level("avx2");
  return level;
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
