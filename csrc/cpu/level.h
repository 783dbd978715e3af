// The CPU kernels of one SIMD level, as plain loops that the compiler vectorises for the level at hand.
//
// baseline.cpp, avx2.cpp and avx512.cpp each include this file under their own TORCHBP_LEVEL and target; backend.cpp
// picks a level at run time. Every function here works on a piece of the data: threads and shapes are backend.cpp's.
#pragma once

#include <algorithm>

#include "../columns.h"
#include "../math.h"
#include "../softmax_ce.h"
#include "batch.h"
#include "few_classes.h"
#include "gemm_level.h"
#include "levels.h"
#include "many_classes.h"
#include "update.h"

namespace torchbp::TORCHBP_LEVEL {

// ---- elementwise -------------------------------------------------------------------------------------------------

// tanh in two loops, the first of which leaves its results in L1. One number takes 23 operations, each of which waits for
// another: 70 cycles in all. A scheduler of 64 entries sees less than three vectors ahead, and half of it waits; with half
// as many operations that take half as long in all, it sees four times as far: 1.2 times as fast, on Zen 3 with AVX2.
template <class C>
void tanh_column(C* y, const C* x, int64_t n) {
  constexpr int64_t block = 256;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = std::min(n, begin + block);
    C h[block];
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) h[i - begin] = tanh_h(x[i]);
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) y[i] = tanh_of(x[i], h[i - begin]);
  }
}

// The loop that has to vectorise. An output may be an input's own memory (an epilogue works in place), so the promise
// to the compiler is ivdep and not restrict.
template <class F, class C>
TORCHBP_INLINE void run_column(C* y, C* z, const C* a, const C* b, const C* c, int64_t n, C parameter) {
  if constexpr (F::is_tanh && !kManyRegisters) return tanh_column(y, a, n);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    C out[F::outputs];
    if constexpr (F::inputs == 1)
      F::apply({a[i]}, out, parameter);
    else if constexpr (F::inputs == 2)
      F::apply({a[i], b[i]}, out, parameter);
    else
      F::apply({a[i], b[i], c[i]}, out, parameter);
    y[i] = out[0];
    if constexpr (F::outputs == 2) z[i] = out[1];
  }
}

template <class F, class T>
void column(void* const* outputs, const void* const* inputs, int64_t n, double parameter) {
  using C = Compute<T>;
  const C p = static_cast<C>(parameter);
  constexpr int second = F::inputs > 1 ? 1 : 0, third = F::inputs - 1, last = F::outputs - 1;
  const T* x[F::inputs];
  T* y[F::outputs];
  for (int k = 0; k < F::inputs; ++k) x[k] = static_cast<const T*>(inputs[k]);
  for (int k = 0; k < F::outputs; ++k) y[k] = static_cast<T*>(outputs[k]);
  if constexpr (std::is_same_v<T, C>) {
    run_column<F>(y[0], y[last], x[0], x[second], x[third], n, p);
  } else {
    // Half types: a vector at a time, which stays in registers from memory to memory; of tanh several, in L1.
    constexpr int64_t width = TORCHBP_VECTOR / sizeof(C) * (F::is_tanh && !kManyRegisters ? 8 : 1);
    int64_t i = 0;
    for (; i + width <= n; i += width) {
      alignas(64) C in[F::inputs][width], out[F::outputs][width];
      for (int k = 0; k < F::inputs; ++k) load_n(in[k], x[k] + i, width);
      run_column<F>(out[0], out[last], in[0], in[second], in[third], width, p);
      for (int k = 0; k < F::outputs; ++k) store_n(y[k] + i, out[k], width);
    }
    if (i == n) return;
    // The last few, among zeros.
    T few_in[F::inputs][width] = {}, few_out[F::outputs][width];
    const void* from[F::inputs];
    void* to[F::outputs];
    for (int k = 0; k < F::inputs; ++k) from[k] = memcpy(few_in[k], x[k] + i, (n - i) * sizeof(T));
    for (int k = 0; k < F::outputs; ++k) to[k] = few_out[k];
    column<F, T>(to, from, width, parameter);
    for (int k = 0; k < F::outputs; ++k) memcpy(y[k] + i, few_out[k], (n - i) * sizeof(T));
  }
}

template <class T>
void load_strided(void* to, const char* from, int64_t stride, int64_t n) {
  T* const y = static_cast<T*>(to);
  if (stride == 0) {
    const T x = *reinterpret_cast<const T*>(from);
    for (int64_t i = 0; i < n; ++i) y[i] = x;
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = *reinterpret_cast<const T*>(from + i * stride);
  }
}

template <class T>
void store_strided(char* to, int64_t stride, const void* from, int64_t n) {
  const T* const x = static_cast<const T*>(from);
  for (int64_t i = 0; i < n; ++i) *reinterpret_cast<T*>(to + i * stride) = x[i];
}

// A whole vector, aligned, to memory past the caches.
TORCHBP_INLINE void stream_vector(void* to, const void* from) {
  const Vector v = load_vector(static_cast<const float*>(from));
#if defined(__clang__)
  __builtin_nontemporal_store(v, static_cast<Vector*>(to));
#elif !defined(__x86_64__)
  *static_cast<Vector*>(to) = v;
#elif TORCHBP_VECTOR == 64
  __builtin_ia32_movntps512(static_cast<float*>(to), v);
#elif TORCHBP_VECTOR == 32
  __builtin_ia32_movntps256(static_cast<float*>(to), v);
#else
  __builtin_ia32_movntps(static_cast<float*>(to), v);
#endif
}

// To a contiguous array.
template <class T>
void stream(char* to, const void* from, int64_t n) {
  constexpr int64_t lanes = TORCHBP_VECTOR / sizeof(T);
  const T* const x = static_cast<const T*>(from);
  T* const y = reinterpret_cast<T*>(to);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(to) % TORCHBP_VECTOR / sizeof(T);
  int64_t i = std::min(n, (lanes - misaligned) % lanes);
  std::copy_n(x, i, y);
  for (; i + lanes <= n; i += lanes) stream_vector(y + i, x + i);
  std::copy_n(x + i, n - i, y + i);
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

// The rows [begin, end): their losses, and log-sum-exp and gradient of the logits where they are asked for. Returns the
// sum of the losses.
template <class Lanes>
double few_classes_forward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  Lanes block(a);
  typename Lanes::Vector lost;
  const bool each = block.has_soft || a.weight || a.loss || a.lse;
  double sums[Lanes::width] = {};
  for (int64_t i = begin; i < end; i += Lanes::lanes) {
    block.read(i, std::min<int64_t>(Lanes::lanes, end - i));
    block.exponentials();
    if (a.grad_input) block.gradient();
    if (each) {  // the logarithms last, as nothing waits for them
      block.logarithms();
      block.loss(lost);
      block.add_to(sums, lost);
      if (a.loss) block.write_loss(lost);
      if (a.lse) block.write_lse();
    } else {
      block.add_plain_losses(sums);
    }
  }
  double sum = 0;
  for (const double s : sums) sum += s;
  return sum;
}

template <class Lanes>
void few_classes_backward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  Lanes block(a);
  for (int64_t i = begin; i < end; i += Lanes::lanes) {
    block.read(i, std::min<int64_t>(Lanes::lanes, end - i));
    block.exponentials();
    block.gradient();
  }
}

template <class T>
double many_classes_forward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  ManyClasses<T> many(a);
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Row<T> row(a, i);
    C shift;
    double total;
    many.softmax(row.x, shift, total);
    const C log_sum = log(static_cast<C>(total));
    if (a.grad_input) many.gradient(row, shift, total);
    const C lost = row.ignored() ? C(0) : row.loss(OneThread(), shift, log_sum);
    sum += lost;
    if (a.loss) store(static_cast<T*>(a.loss) + i, lost);
    if (a.lse) static_cast<C*>(a.lse)[i] = shift + log_sum;
  }
  return sum;
}

template <class T>
void many_classes_backward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  ManyClasses<T> many(a);
  for (int64_t i = begin; i < end; ++i) {
    const Row<T> row(a, i);
    Compute<T> shift;
    double total;
    many.softmax(row.x, shift, total);
    many.gradient(row, shift, total);
  }
}

// Blocks that fit in L1: the fewer classes, the more rows, so that each step has several vectors to work on.
template <class T>
using Few = Lanes<T, 64, 32>;
template <class T>
using FewRows = Lanes<T, 32, 32>;  // of a small batch
template <class T>
using NotSoFew = Lanes<T, 16, 128>;

template <class T>
double softmax_ce_forward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  if (a.classes == 0 || a.classes > 128) return many_classes_forward<T>(a, begin, end);
  if (a.classes > 32) return few_classes_forward<NotSoFew<T>>(a, begin, end);
  return end - begin <= FewRows<T>::lanes ? few_classes_forward<FewRows<T>>(a, begin, end)
                                          : few_classes_forward<Few<T>>(a, begin, end);
}

template <class T>
void softmax_ce_backward(const SoftmaxCE& a, int64_t begin, int64_t end) {
  if (a.grad_input && a.classes > 128)
    many_classes_backward<T>(a, begin, end);
  else if (a.grad_input && a.classes > 32)
    few_classes_backward<NotSoFew<T>>(a, begin, end);
  else if (a.grad_input && a.classes > 0)
    few_classes_backward<Few<T>>(a, begin, end);
  if (a.grad_probabilities)
    for (int64_t i = begin; i < end; ++i)
      Row<T>(a, i).backward_probabilities(OneThread(), static_cast<const Compute<T>*>(a.lse)[i],
                                          static_cast<T*>(a.grad_probabilities) + i * a.classes);
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
template <class T>
double sum_of_squares(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) {
      const double v = load(x[i + k]);
      sums[k] += v * v;
    }
  for (; i < n; ++i) {
    const double v = load(x[i]);
    sums[0] += v * v;
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// ---- the table of functions --------------------------------------------------------------------------------------

template <class T>
void fill_dtype(Level& level, DtypeIndex dtype) {
#define ENTRY(which) level.column[static_cast<int>(Kernel::which)][dtype] = column<which, T>;
#define ROW(name, ...) ENTRY(name##_forward) ENTRY(name##_backward)
  TORCHBP_UNARY_GATES(ROW)
#undef ROW
#define ROW(name, ...) ENTRY(name##_forward) ENTRY(name##_backward) ENTRY(name##_backward_a) ENTRY(name##_backward_b)
  TORCHBP_BINARY_GATES(ROW)
#undef ROW
#undef ENTRY
  level.load[dtype] = load_strided<T>;
  level.store[dtype] = store_strided<T>;
  level.stream[dtype] = stream<T>;
  level.softmax_ce_count[dtype] = softmax_ce_count<T>;
  level.softmax_ce_forward[dtype] = softmax_ce_forward<T>;
  level.softmax_ce_backward[dtype] = softmax_ce_backward<T>;
  level.maxout_forward[dtype] = maxout_forward_rows<T>;
  level.maxout_backward[dtype] = maxout_backward_rows<T>;
  level.batch[dtype] = batch_rows<T>;
  level.sum_of_squares[dtype] = sum_of_squares<T>;
  level.update[dtype] = update<T>;
}

inline Level make_level(const char* name) {
  Level level{};
  level.name = name;
  fill_dtype<double>(level, kFloat64);
  fill_dtype<float>(level, kFloat32);
  fill_dtype<BFloat16>(level, kBFloat16);
  fill_dtype<Half>(level, kFloat16);
  fill_gemm<float>(level, kFloat32);
  return level;
}

}  // namespace torchbp::TORCHBP_LEVEL
