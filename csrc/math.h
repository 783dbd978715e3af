// The words that the rows of gates.h are written in: where, abs, exp, expm1, tanh, isnan. And log, for the softmax.
//
// On the CPU each is branch-free arithmetic that the compiler turns into vector instructions of the level at hand
// (libm calls would stop that); on CUDA they are the device library's functions. Included once per SIMD level, inside
// a namespace of that level's own, so that no level's code is ever linked into another's.
#ifndef TORCHBP_LEVEL
#error "define TORCHBP_LEVEL (baseline, avx2, avx512, cuda) before including math.h"
#endif
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define TORCHBP_INLINE __device__ __forceinline__
#else
#define TORCHBP_INLINE inline __attribute__((always_inline))
#endif

namespace torchbp::TORCHBP_LEVEL {

// Reads the bits of one type as another of the same size.
template <class To, class From>
TORCHBP_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A, class B>
TORCHBP_INLINE std::common_type_t<A, B> where(bool condition, A a, B b) {
  using C = std::common_type_t<A, B>;
  return condition ? static_cast<C>(a) : static_cast<C>(b);
}

template <class T>
TORCHBP_INLINE T abs(T x) {
#if defined(__CUDACC__)
  return ::fabs(x);
#else
  return std::abs(x);
#endif
}

template <class T>
TORCHBP_INLINE bool isnan(T x) {
  return x != x;
}

#if defined(__CUDACC__)

// The device library's functions: at most 2 ulp in float32 and 1 ulp in float64 (CUDA C++ Programming Guide, 17.1).
TORCHBP_INLINE float exp(float x) { return ::expf(x); }
TORCHBP_INLINE double exp(double x) { return ::exp(x); }
TORCHBP_INLINE float expm1(float x) { return ::expm1f(x); }
TORCHBP_INLINE double expm1(double x) { return ::expm1(x); }
TORCHBP_INLINE float tanh(float x) { return ::tanhf(x); }
TORCHBP_INLINE double tanh(double x) { return ::tanh(x); }
TORCHBP_INLINE float log(float x) { return ::logf(x); }
TORCHBP_INLINE double log(double x) { return ::log(x); }

#else

// What the range reduction x = k ln 2 + r, |r| <= ln 2 / 2, needs to know of a type.
template <class T>
struct Reduce;

template <>
struct Reduce<float> {
  using Int = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  // Nearly the best of its degree: off by at most 3.1e-9 of e^r.
  static constexpr float series[] = {0.499999940f, 0.166665211f, 0.0416683964f, 0.00836874079f, 0.00138139888f};
  static constexpr float log2e = 1.44269504f, hi = 0.693145752f, lo = 1.42860677e-06f;
  static constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  static constexpr float least = -104.f, most = 89.f;
  static constexpr float least_normal = -87.f;  // a whole number whose power is still normal
};

template <>
struct Reduce<double> {
  using Int = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  // 1/2!, ..., 1/13!: the first term left out is below 5e-18 of the result.
  static constexpr double series[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                      1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                      1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  static constexpr double log2e = 1.4426950408889634, hi = 0.693147180369123816490, lo = 1.90821492927058770002e-10;
  static constexpr double round = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double least = -746., most = 710.;
  static constexpr double least_normal = -708.;
};

// expm1(r) = r + r^2 (c[0] + c[1] r + ...), good to less than a tenth of an ulp on |r| <= ln 2 / 2.
template <class T>
TORCHBP_INLINE T expm1_series(T r) {
  constexpr auto& c = Reduce<T>::series;
  constexpr int n = static_cast<int>(std::size(c));
  T p = c[n - 1];
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) p = p * r + c[i];
  return r + (r * r) * p;
}

// 2^k, of the normal range, from whole numbers whose lowest bits are those of k + bias.
template <class T>
TORCHBP_INLINE T power_of_two(typename Reduce<T>::Int biased) {
  return bits<T>(biased << Reduce<T>::mantissa);
}

// x = k ln 2 + r, with the k of `bounded` where that is not x; returns r, and sets a whole number whose lowest bits are
// those of k + `more`, which costs nothing in the number that is added to round. `bounded` must lie in [least, most].
template <int more, class T>
TORCHBP_INLINE T reduce(T x, T bounded, typename Reduce<T>::Int& k_and_more) {
  using R = Reduce<T>;
  constexpr T round = R::round + more;
  const T shifted = bounded * R::log2e + round;
  k_and_more = bits<typename R::Int>(shifted);
  const T whole = shifted - round;
  return (x - whole * R::hi) - whole * R::lo;
}

// The lesser of any a and a b that is not negative, and NaN or b where a is NaN: in one instruction on their bits, where
// the comparison of numbers is taken apart by g++ and made of three.
template <class T>
TORCHBP_INLINE T lesser(T a, T b) {
  using Int = typename Reduce<T>::Int;
  const Int i = bits<Int>(a), j = bits<Int>(b);
  return bits<T>(i < j ? i : j);
}

// e^x, subnormal results and infinities included: the two halves of 2^k are normal numbers, and only the last product
// rounds. Beyond `most` r grows with x, and the result is infinite all the more. NaN runs through the arithmetic by itself.
template <class T>
TORCHBP_INLINE T exp(T x) {
  using R = Reduce<T>;
  typename R::Int k;  // with a bias for each half
  const T from_least = where(x < R::least, R::least, x);
  const T r = reduce<2 * R::bias>(from_least, lesser(from_least, R::most), k);
  const typename R::Int half = k >> 1;
  return (1 + expm1_series(r)) * power_of_two<T>(half) * power_of_two<T>(k - half);
}

// e^x for x <= 0, where it costs less: what would be subnormal is 0.
template <class T>
TORCHBP_INLINE T exp_to_one(T x) {
  using R = Reduce<T>;
  typename R::Int k;
  const T bounded = where(x < R::least_normal, R::least_normal, x);
  const T y = 1 + expm1_series(reduce<R::bias>(bounded, bounded, k));
  return where(x < R::least_normal, 0, y * power_of_two<T>(k));
}

// (e^x - 1) / 2 without the cancellation near 0: 2^k (expm1(r) + 1) - 1 = 2^k expm1(r) + (2^k - 1), halved so that 2^k
// cannot overflow before the result does. `bounded` must lie where 2^(k-1) is a normal number. Where that is less than x,
// the result is no less than at `bounded`, and NaN where x is.
template <class T>
TORCHBP_INLINE T half_expm1(T x, T bounded) {
  typename Reduce<T>::Int k;
  const T r = reduce<Reduce<T>::bias - 1>(x, bounded, k);
  const T half = power_of_two<T>(k);
  return expm1_series(r) * half + (half - T(0.5));
}

// e^x - 1.
template <class T>
TORCHBP_INLINE T expm1(T x) {
  using R = Reduce<T>;
  constexpr T minus_one = -(R::mantissa + 5);  // e^x is lost beside 1 from here on
  const T from_minus_one = where(x < minus_one, minus_one, x);
  const T y = 2 * half_expm1(from_minus_one, lesser(from_minus_one, R::most));
  return x == 0 ? x : y;  // -0 stays -0
}

// tanh(|x|) = h / (h + 1) with h = expm1(2 |x|) / 2; then the sign of x. For large h the same as 1 - 1 / (h + 1): near 1,
// the errors of what is taken off hardly count, which matters to 1 - y^2 in the backward. For small h, where that cancels
// and h / (h + 1) has all of the error of h, the same as h - h q with q = h / (h + 1), in which the errors of q are small
// beside h. Both are a - a q with q = a / (h + 1), where a is h or 1, whichever is less. Beyond 20 the result is 1 in
// every dtype. In two steps, as a loop over many numbers is faster in two (level.h).
template <class T>
TORCHBP_INLINE T tanh_h(T x) {
  const T twice = 2 * abs(x);
  return half_expm1(twice, lesser(twice, T(40)));
}
template <class T>
TORCHBP_INLINE T tanh_of(T x, T h) {
  using Int = typename Reduce<T>::Int;
  const T a = lesser(h, T(1)), q = a / (h + 1);
  return bits<T>(bits<Int>(a - a * q) | (bits<Int>(x) & std::numeric_limits<Int>::min()));
}
template <class T>
TORCHBP_INLINE T tanh(T x) {
  return tanh_of(x, tanh_h(x));
}

// x = 2^k (1 + f) with 1 + f from sqrt(1/2) to sqrt(2); with s = f / (2 + f), log(1 + f) = 2 atanh(s) is
// f - f^2 / 2 + s (f^2 / 2 + 2 s^2 / 3 + 2 s^4 / 5 + ...): |s| <= 0.172, and the first term left out is below a
// hundredth of an ulp.
template <class T>
TORCHBP_INLINE T log(T x) {
  using R = Reduce<T>;
  using Int = typename R::Int;
  constexpr int terms = R::mantissa < 30 ? 5 : 10;
  const bool subnormal = x < std::numeric_limits<T>::min();
  const Int root = bits<Int>(T(0.70710678118654752));
  const Int shifted = bits<Int>(where(subnormal, x * power_of_two<T>(R::mantissa + 1 + R::bias), x)) - root;
  const Int k = (shifted >> R::mantissa) - where(subnormal, Int(R::mantissa + 1), Int(0));
  const T f = bits<T>((shifted & ((Int(1) << R::mantissa) - 1)) + root) - 1;
  const T s = f / (2 + f), z = s * s;
  T series = T(2) / (2 * terms + 1);
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 1; --i) series = series * z + T(2) / (2 * i + 1);
  const T square = f * f / 2;
  // A whole number as a T, by the same trick as in reduce: not every level converts 64-bit integers.
  const T whole = bits<T>(k + bits<Int>(R::round)) - R::round;
  const T y = whole * R::hi - ((square - (s * (square + z * series) + whole * R::lo)) - f);
  const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  return where(x > 0, where(x == infinity, x, y), where(x == 0, -infinity, nan));
}

#endif

}  // namespace torchbp::TORCHBP_LEVEL
