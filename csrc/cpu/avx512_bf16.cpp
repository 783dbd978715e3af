// Products of bfloat16 for machines that multiply pairs of it (AVX512_BF16), beside all that level avx512 has.
#if defined(__x86_64__)
#include "system.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define TORCHBP_LEVEL avx512_bf16
#define TORCHBP_VECTOR 64
#include "gemm_level.h"

namespace torchbp::TORCHBP_LEVEL {

// Half a vector of bfloat16, anywhere.
typedef Words16 UnalignedHalves __attribute__((aligned(1), may_alias));

template <>
struct Words<BFloat16> {
  // To sum, the product of the second of each pair and then that of the first: exact products, each sum rounded to
  // float32, subnormal numbers as 0.
  static TORCHBP_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static TORCHBP_INLINE Least multiply_add(Least a, Least b, Least sum) {
    return _mm256_dpbf16_ps(sum, (__m256bh)a, (__m256bh)b);
  }
  static TORCHBP_INLINE Vector of_columns(const BFloat16* from, int64_t k_stride, bool whole) {
    return interleaved(load(from), whole ? load(from + k_stride) : Words16{}, std::make_index_sequence<2 * kLanes>());
  }

private:
  static TORCHBP_INLINE Words16 load(const BFloat16* p) { return *reinterpret_cast<const UnalignedHalves*>(p); }
  template <size_t... i>
  static TORCHBP_INLINE Vector interleaved(Words16 a, Words16 b, std::index_sequence<i...>) {
    return (Vector)__builtin_shufflevector(a, b, (i % 2 * kLanes + i / 2)...);
  }
};

}  // namespace torchbp::TORCHBP_LEVEL

const torchbp::Level& torchbp::avx512_bf16_level() {
  static const Level level = [] {
    Level all = avx512_level();
    avx512_bf16::fill_gemm<avx512_bf16::BFloat16>(all, kBFloat16);
    return all;
  }();
  return level;
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
