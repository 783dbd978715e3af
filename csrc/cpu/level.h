// The CPU kernels of one SIMD level, as plain loops that the compiler vectorises for the level at hand.
//
// baseline.cpp, avx2.cpp and avx512.cpp each include this file under their own TORCHBP_LEVEL and target; backend.cpp
// picks a level at run time. Every function here works on a piece of the data: threads and shapes are backend.cpp's.
#pragma once

#include <algorithm>

#include "../columns.h"
#include "../math.h"
#include "../softmax_ce.h"
#include "few_classes.h"
#include "levels.h"

namespace torchbp::TORCHBP_LEVEL {

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
    load_n(y, x, n);
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = load(*reinterpret_cast<const T*>(from + i * stride));
  }
}

template <class T>
void store_strided(char* to, int64_t stride, const void* from, int64_t n) {
  const auto* const x = static_cast<const Compute<T>*>(from);
  if (stride == sizeof(T)) {
    T* const y = reinterpret_cast<T*>(to);
    store_n(y, x, n);
  } else {
    for (int64_t i = 0; i < n; ++i) store(reinterpret_cast<T*>(to + i * stride), x[i]);
  }
}

// ---- softmax cross-entropy of few classes ------------------------------------------------------------------------

// Rows [begin, end): the loss, and the log-sum-exp and the gradient of the logits where they are asked for.
template <class T>
double few_classes_forward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  Lanes<T> lanes(a);
  double sums[kLanes] = {};
  for (int64_t i = begin; i < end; i += kLanes) {
    lanes.read(i, std::min<int64_t>(kLanes, end - i));
    lanes.exponentials();
    typename Lanes<T>::Vector lost;
    lanes.loss(lost);
    for (int k = 0; k < kLanes; ++k) sums[k] += lost.numbers()[k];
    if (a.loss) store_n(static_cast<T*>(a.loss) + i, lost.numbers(), lanes.rows);
    if (a.lse)
      for (int k = 0; k < lanes.rows; ++k)
        static_cast<C*>(a.lse)[i + k] = lanes.shift.numbers()[k] + lanes.log_sum.numbers()[k];
    if (a.grad_input) lanes.gradient();
  }
  double sum = 0;
  for (const double s : sums) sum += s;
  return sum;
}

template <class T>
void few_classes_backward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  Lanes<T> lanes(a);
  for (int64_t i = begin; i < end; i += kLanes) {
    lanes.read(i, std::min<int64_t>(kLanes, end - i));
    lanes.probabilities(static_cast<const Compute<T>*>(a.lse));
    lanes.gradient();
  }
}

// ---- softmax cross-entropy of many classes: vectors along a row --------------------------------------------------

// term(0) + ... + term(n - 1): sixteen running sums that make vectors, emptied into a float64 every so often so that
// many classes lose no digits.
struct OneThread {
  static constexpr int rank = 0, size = 1;
  template <class F>
  TORCHBP_INLINE double sum_of(int64_t n, const F& term) const {
    using C = decltype(term(0));
    constexpr int64_t lanes = 16, block = 64 * lanes;
    double sum = 0;
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t end = std::min(n, begin + block), whole = begin + (end - begin) / lanes * lanes;
      C sums[lanes] = {};
      for (int64_t c = begin; c < whole; c += lanes)
        for (int64_t k = 0; k < lanes; ++k) sums[k] += term(c + k);
      for (int64_t c = whole; c < end; ++c) sums[0] += term(c);
      for (const C s : sums) sum += s;
    }
    return sum;
  }
};

// The largest of a row, NaN aside.
template <class T>
TORCHBP_INLINE Compute<T> largest(const T* x, int64_t n) {
  using C = Compute<T>;
  constexpr int lanes = 64;
  C most[lanes];
  for (C& m : most) m = -std::numeric_limits<C>::infinity();
  int64_t c = 0;
  for (; c + lanes <= n; c += lanes)
    for (int k = 0; k < lanes; ++k) most[k] = load(x[c + k]) > most[k] ? load(x[c + k]) : most[k];
  for (; c < n; ++c) most[0] = load(x[c]) > most[0] ? load(x[c]) : most[0];
  for (int k = 1; k < lanes; ++k) most[0] = most[k] > most[0] ? most[k] : most[0];
  return most[0];
}

template <class T>
double many_classes_forward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr OneThread group;
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Row<T> row(a, i);
    const T* x = row.x;
    // A row of only -inf has no softmax: shifting by 0 then gives torch's nan instead of ours by -inf - -inf.
    const C most = largest(x, a.classes), shift = most == -std::numeric_limits<C>::infinity() ? C(0) : most;
    const C lse =
        shift + log(static_cast<C>(group.sum_of(a.classes, [&](int64_t c) { return exp_to_one(load(x[c]) - shift); })));
    C lost = 0, counted = 0;
    if (!row.ignored()) row.loss(group, lse, lost, counted);
    sum += lost;
    if (a.loss) store(static_cast<T*>(a.loss) + i, lost);
    if (a.lse) static_cast<C*>(a.lse)[i] = lse;
    if (a.grad_input) row.backward(group, lse, *static_cast<const C*>(a.total));
  }
  return sum;
}

template <class T>
void many_classes_backward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  for (int64_t i = begin; i < end; ++i)
    Row<T>(a, i).backward(OneThread(), static_cast<const C*>(a.lse)[i], *static_cast<const C*>(a.total));
}

// ---- softmax cross-entropy ---------------------------------------------------------------------------------------

// What rows of class indices count: 1 or the weight of the class, 0 where ignored. Sets bad_row to a row whose index is
// out of range, if there is one.
template <class T>
double softmax_ce_count(const SoftmaxCE& a, int64_t begin, int64_t end, int64_t& bad_row) {
  const uint64_t classes = static_cast<uint64_t>(a.classes);
  int64_t kept = 0, bad = 0;
  for (int64_t i = begin; i < end; ++i) {
    const bool counts = a.target[i] != a.ignore_index;
    kept += counts;
    bad += counts & (static_cast<uint64_t>(a.target[i]) >= classes);
  }
  if (bad > 0) {
    int64_t i = begin;
    while (a.target[i] == a.ignore_index || static_cast<uint64_t>(a.target[i]) < classes) ++i;
    __atomic_store_n(&bad_row, i, __ATOMIC_RELAXED);  // any one of them will do
    return 0;
  }
  if (!a.weight) return static_cast<double>(kept);
  const T* const weight = static_cast<const T*>(a.weight);
  double sums[4] = {};
  for (int64_t i = begin; i < end; ++i)
    sums[(i - begin) % 4] += a.target[i] == a.ignore_index ? 0.0 : static_cast<double>(load(weight[a.target[i]]));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline bool has_few_classes(const SoftmaxCE& a) { return a.classes > 0 && a.classes <= kFewClasses; }

// Returns the sum of the rows' losses.
template <class T>
double softmax_ce_forward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  return has_few_classes(a) ? few_classes_forward<T>(a, begin, end) : many_classes_forward<T>(a, begin, end);
}

template <class T>
void softmax_ce_backward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  if (has_few_classes(a) && !a.grad_probabilities)
    few_classes_backward<T>(a, begin, end);
  else
    many_classes_backward<T>(a, begin, end);
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
  level.softmax_ce_count[dtype] = softmax_ce_count<T>;
  level.softmax_ce_forward[dtype] = softmax_ce_forward<T>;
  level.softmax_ce_backward[dtype] = softmax_ce_backward<T>;
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
