// The CPU kernels for machines with AVX-512 (F, BW, DQ, VL), on whole 512-bit registers.
#if defined(__x86_64__)
#include "system.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define TORCHBP_LEVEL avx512
#define TORCHBP_VECTOR 64
#include "level.h"

const torchbp::Level& torchbp::avx512_level() {
  static const Level level = avx512::make_level("avx512");
  return level;
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
