// The CPU kernels of one SIMD level, as plain loops that the compiler vectorises for the level at hand.
//
// baseline.cpp, avx2.cpp and avx512.cpp each include this file under their own TORCHBP_LEVEL and target; backend.cpp
// picks a level at run time. Every function here works on a piece of the data: threads and shapes are backend.cpp's.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../columns.h"
#include "../math.h"
#include "levels.h"

namespace torchbp::TORCHBP_LEVEL {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// ---- loading and storing: half types are kept in 16 bits and computed in float32 ---------------------------------

TORCHBP_INLINE float load(float x) { return x; }
TORCHBP_INLINE double load(double x) { return x; }
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

TORCHBP_INLINE void store(float* p, float x) { *p = x; }
TORCHBP_INLINE void store(double* p, double x) { *p = x; }
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

template <class T>
using Compute = decltype(load(T()));

// ---- elementwise -------------------------------------------------------------------------------------------------

// The loop that has to vectorise. An output may be an input's own memory (an epilogue works in place), so the promise
// to the compiler is ivdep and not restrict.
template <class F, class C>
void column(void* const* outputs, const void* const* inputs, int64_t n, double parameter) {
  const C p = static_cast<C>(parameter);
  C* const y = static_cast<C*>(outputs[0]);
  C* const z = static_cast<C*>(outputs[F::outputs - 1]);
  const C* const a = static_cast<const C*>(inputs[0]);
  const C* const b = static_cast<const C*>(inputs[F::inputs > 1 ? 1 : 0]);
  const C* const c = static_cast<const C*>(inputs[F::inputs - 1]);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    C out[F::outputs];
    if constexpr (F::inputs == 1)
      F::apply({a[i]}, out, p);
    else if constexpr (F::inputs == 2)
      F::apply({a[i], b[i]}, out, p);
    else
      F::apply({a[i], b[i], c[i]}, out, p);
    y[i] = out[0];
    if constexpr (F::outputs == 2) z[i] = out[1];
  }
}

template <class T>
void load_strided(void* to, const char* from, int64_t stride, int64_t n) {
  auto* const y = static_cast<Compute<T>*>(to);
  if (stride == sizeof(T)) {
    const T* const x = reinterpret_cast<const T*>(from);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = load(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = load(*reinterpret_cast<const T*>(from + i * stride));
  }
}

template <class T>
void store_strided(char* to, int64_t stride, const void* from, int64_t n) {
  const auto* const x = static_cast<const Compute<T>*>(from);
  if (stride == sizeof(T)) {
    T* const y = reinterpret_cast<T*>(to);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) store(y + i, x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) store(reinterpret_cast<T*>(to + i * stride), x[i]);
  }
}

// ---- softmax cross-entropy ---------------------------------------------------------------------------------------

// The formulas, with p = softmax(x), lse = log sum exp(x), w the class weights, s the label smoothing and q the
// target distribution (q = (1 - s) onehot(t) + s / C for a class index t, (1 - s) q + s / C for probabilities):
//
//   loss = sum_c w_c q_c (lse - x_c)        dx_c = dloss (p_c sum_k w_k q_k - w_c q_c)
//   dq_c = dloss (1 - s) w_c (lse - x_c)
//
// A class index t needs no pass over q: sum_c w_c q_c is (1 - s) w_t + s / C sum_c w_c.

template <class T>
struct Row {
  using C = Compute<T>;
  const SoftmaxCE& a;
  const T* x;
  const T* q;
  const T* weight;
  int64_t target;
  C smooth_each;  // s / C

  Row(const SoftmaxCE& a, int64_t i)
      : a(a),
        x(static_cast<const T*>(a.input) + i * a.classes),
        q(a.probabilities ? static_cast<const T*>(a.probabilities) + i * a.classes : nullptr),
        weight(static_cast<const T*>(a.weight)),
        target(a.target ? a.target[i] : -1),
        smooth_each(static_cast<C>(a.label_smoothing / static_cast<double>(a.classes))) {}

  bool ignored() const { return a.target && target == a.ignore_index; }
  bool in_range() const { return !a.target || (target >= 0 && target < a.classes); }
  C w(int64_t c) const { return weight ? load(weight[c]) : C(1); }
  // q_c but for the one-hot part, which is added where the index is known.
  C soft(int64_t c) const { return q ? C(1 - a.label_smoothing) * load(q[c]) + smooth_each : smooth_each; }
};

template <class T>
void softmax_ce_forward_rows(const SoftmaxCE& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const C keep = static_cast<C>(1 - a.label_smoothing);
  for (int64_t i = begin; i < end; ++i) {
    const Row<T> row(a, i);
    const T* x = row.x;
    C most = -std::numeric_limits<C>::infinity();
    for (int64_t c = 0; c < a.classes; ++c) most = load(x[c]) > most ? load(x[c]) : most;
    // A row of only -inf has no softmax: shifting by 0 then gives torch's nan instead of ours by -inf - -inf.
    const C shift = most == -std::numeric_limits<C>::infinity() ? C(0) : most;
    C sum = 0;
    for (int64_t c = 0; c < a.classes; ++c) sum += exp(load(x[c]) - shift);
    const C lse = shift + std::log(sum);
    static_cast<C*>(a.lse)[i] = lse;
    C loss = 0, count = 0;
    if (!row.in_range() && !row.ignored()) {
      __atomic_store_n(a.bad_row, i, __ATOMIC_RELAXED);  // any one of them will do
    } else if (!row.ignored()) {
      if (row.q || a.label_smoothing != 0)
        for (int64_t c = 0; c < a.classes; ++c) loss += row.w(c) * row.soft(c) * (lse - load(x[c]));
      count = 1;
      if (!row.q) {
        count = row.w(row.target);
        loss += keep * count * (lse - load(x[row.target]));
      }
    }
    static_cast<C*>(a.row_loss)[i] = loss;
    static_cast<C*>(a.row_weight)[i] = count;
  }
}

template <class T>
void softmax_ce_backward_rows(const SoftmaxCE& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const C keep = static_cast<C>(1 - a.label_smoothing);
  const C total = a.total ? *static_cast<const C*>(a.total) : C(1);
  for (int64_t i = begin; i < end; ++i) {
    const Row<T> row(a, i);
    const T* x = row.x;
    const C lse = static_cast<const C*>(a.lse)[i];
    const C g = load(static_cast<const T*>(a.grad)[i * a.grad_stride]) / total;
    if (a.grad_input) {
      T* dx = static_cast<T*>(a.grad_input) + i * a.classes;
      if (row.ignored() || !row.in_range()) {
        for (int64_t c = 0; c < a.classes; ++c) store(dx + c, C(0));
      } else if (row.q || a.label_smoothing != 0) {
        const C onehot = row.q ? C(0) : keep * row.w(row.target);
        C mass = onehot;
        for (int64_t c = 0; c < a.classes; ++c) mass += row.w(c) * row.soft(c);
        for (int64_t c = 0; c < a.classes; ++c)
          store(dx + c,
                g * (exp(load(x[c]) - lse) * mass - row.w(c) * row.soft(c) - (c == row.target ? onehot : C(0))));
      } else {
        const C gw = g * row.w(row.target);
        for (int64_t c = 0; c < a.classes; ++c)
          store(dx + c, gw * (exp(load(x[c]) - lse) - (c == row.target ? C(1) : C(0))));
      }
    }
    if (a.grad_probabilities) {
      T* dq = static_cast<T*>(a.grad_probabilities) + i * a.classes;
      for (int64_t c = 0; c < a.classes; ++c) store(dq + c, g * keep * row.w(c) * (lse - load(x[c])));
    }
  }
}

// ---- maxout ------------------------------------------------------------------------------------------------------

template <class T>
void maxout_forward_rows(const Maxout& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* z = static_cast<const T*>(a.z) + i * a.pieces * a.out;
    T* y = static_cast<T*>(a.y) + i * a.out;
    uint8_t* index = a.index + i * a.out;
    std::copy_n(z, a.out, y);
    std::fill_n(index, a.out, uint8_t(0));
    for (int64_t piece = 1; piece < a.pieces; ++piece) {
      z += a.out;
      for (int64_t o = 0; o < a.out; ++o) {
        const auto best = load(y[o]), here = load(z[o]);
        const bool wins = (here > best) | (isnan(here) & !isnan(best));  // the first of equals; nan beats all
        y[o] = wins ? z[o] : y[o];
        index[o] = wins ? static_cast<uint8_t>(piece) : index[o];
      }
    }
  }
}

template <class T>
void maxout_backward_rows(const Maxout& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* dy = static_cast<const T*>(a.grad_y) + i * a.out;
    const uint8_t* index = a.index + i * a.out;
    T* dz = static_cast<T*>(a.grad_z) + i * a.pieces * a.out;
    for (int64_t piece = 0; piece < a.pieces; ++piece, dz += a.out)
      for (int64_t o = 0; o < a.out; ++o) dz[o] = index[o] == piece ? dy[o] : T(0);
  }
}

// ---- sums --------------------------------------------------------------------------------------------------------

// Eight running sums let the additions overlap; float64 keeps the result independent of the order to rounding.
template <class T, bool square>
double sum_of(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) {
      const double v = load(x[i + k]);
      sums[k] += square ? v * v : v;
    }
  for (; i < n; ++i) {
    const double v = load(x[i]);
    sums[0] += square ? v * v : v;
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// ---- the table of functions --------------------------------------------------------------------------------------

template <class T>
void fill_dtype(Level& level, DtypeIndex dtype) {
  level.load[dtype] = load_strided<T>;
  level.store[dtype] = store_strided<T>;
  level.softmax_ce_forward[dtype] = softmax_ce_forward_rows<T>;
  level.softmax_ce_backward[dtype] = softmax_ce_backward_rows<T>;
  level.maxout_forward[dtype] = maxout_forward_rows<T>;
  level.maxout_backward[dtype] = maxout_backward_rows<T>;
  level.sum[dtype] = sum_of<T, false>;
  level.sum_of_squares[dtype] = sum_of<T, true>;
}

inline Level make_level(const char* name) {
  Level level{};
  level.name = name;
#define ENTRY(which)                                                               \
  level.column[static_cast<int>(Kernel::which)][kFloat64] = column<which, double>; \
  level.column[static_cast<int>(Kernel::which)][kFloat32] = column<which, float>;
#define ROW(name, ...) ENTRY(name##_forward) ENTRY(name##_backward)
  TORCHBP_UNARY_GATES(ROW)
#undef ROW
#define ROW(name, ...) ENTRY(name##_forward) ENTRY(name##_backward) ENTRY(name##_backward_a) ENTRY(name##_backward_b)
  TORCHBP_BINARY_GATES(ROW)
#undef ROW
#undef ENTRY
  fill_dtype<double>(level, kFloat64);
  fill_dtype<float>(level, kFloat32);
  fill_dtype<BFloat16>(level, kBFloat16);
  fill_dtype<Half>(level, kFloat16);
  return level;
}

}  // namespace torchbp::TORCHBP_LEVEL
