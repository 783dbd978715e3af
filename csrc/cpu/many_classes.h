// Softmax cross-entropy of many classes on the CPU: vectors along a row, which passes through L1 in pieces.
//
// The formulas are those of softmax_ce.h.
#pragma once

#include <algorithm>

#include "../softmax_ce.h"
#include "exponential.h"

namespace torchbp::TORCHBP_LEVEL {

// The group of a row that has one thread: sixteen running sums that make vectors, emptied into a float64 every so often
// so that many classes lose no digits.
struct OneThread {
  static constexpr int rank = 0, size = 1;
  template <class F>
  TORCHBP_INLINE double sum_of(int64_t n, const F& term) const {
    using C = decltype(term(0));
    constexpr int64_t lanes = 16, block = 16 * lanes;
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

// A piece of a row, and its exponentials. Loops run over blocks of four vectors, none of which waits for another; behind
// the end stands -inf, whose exponential is 0.
template <class T>
struct Piece {
  using C = Compute<T>;
  static constexpr int width = TORCHBP_VECTOR / sizeof(C);
  static constexpr int64_t size = 2048, lanes = 4 * width;
  typedef C Vector __attribute__((vector_size(TORCHBP_VECTOR)));
  alignas(64) C x[size];

  // f(block, j) for each block of the n numbers, the jth and what follows it, in the compute dtype. They are read where
  // they are, or pass through x; held: whether they are there already.
  template <class F>
  TORCHBP_INLINE void for_blocks(const T* from, int64_t n, bool held, const F& f) {
    const int64_t whole = n / lanes * lanes;
    for (int64_t j = 0; j < whole; j += lanes) {
      if constexpr (std::is_same_v<T, C>) {
        f(from + j, j);
      } else {
        if (!held) load_n(x + j, from + j, lanes);
        f(x + j, j);
      }
    }
    if (whole == n) return;
    if (!held) {
      std::fill_n(x + whole, lanes, -std::numeric_limits<C>::infinity());
      load_n(x + whole, from + whole, n - whole);
    }
    f(x + whole, whole);
  }

  TORCHBP_INLINE static Vector vector(const C* p) {
    Vector v;
    memcpy(&v, p, sizeof(v));
    return v;
  }

  // The largest, nan aside. x holds the piece then if it has another dtype.
  TORCHBP_INLINE C most(const T* from, int64_t n) {
    constexpr C least = -std::numeric_limits<C>::infinity();
    Vector m[4] = {least + Vector{}, least + Vector{}, least + Vector{}, least + Vector{}};
    for_blocks(from, n, false, [&](const C* block, int64_t) {
      for (int i = 0; i < 4; ++i) {
        const Vector here = vector(block + i * width);
        m[i] = here > m[i] ? here : m[i];
      }
    });
    for (int i = 1; i < 4; ++i) m[0] = m[i] > m[0] ? m[i] : m[0];
    C all = m[0][0];
    for (int k = 1; k < width; ++k) all = m[0][k] > all ? m[0][k] : all;
    return all;
  }

  // x = exp(piece - shift). Returns their sum. Meanwhile memory brings what is next: the numbers of the next row, and the
  // lines that the gradient is written to.
  TORCHBP_INLINE C exponentials(const T* from, int64_t n, bool held, C shift, const T* next, const T* to) {
    Vector s[4] = {};
    for_blocks(from, n, held, [&](const C* block, int64_t j) {
      for (int64_t k = j; k < j + lanes; k += 64 / sizeof(T)) {
        if (next) __builtin_prefetch(next + k);
        if (to) __builtin_prefetch(to + k, 1);
      }
      for (int i = 0; i < 4; ++i) {
        const Vector y = exp_to_one_of<C>(vector(block + i * width) - shift);
        memcpy(x + j + i * width, &y, sizeof(y));
        s[i] += y;
      }
    });
    const Vector all = (s[0] + s[1]) + (s[2] + s[3]);
    C sums[width];
    memcpy(sums, &all, sizeof(all));
    for (int half = width / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    return sums[0];
  }
};

template <class T>
struct ManyClasses {
  using C = Compute<T>;
  const SoftmaxCE& a;
  Piece<T> piece;

  TORCHBP_INLINE explicit ManyClasses(const SoftmaxCE& a) : a(a) {}

  // f(first, n) for each piece of a row.
  template <class F>
  TORCHBP_INLINE void for_pieces(const F& f) const {
    for (int64_t c = 0; c < a.classes; c += piece.size) f(c, std::min(piece.size, a.classes - c));
  }

  // The largest x of a row and the sum of exp(x - shift), which stays in the piece if the row is one.
  TORCHBP_INLINE void softmax(const T* x, C& shift, double& sum) {
    constexpr C least = -std::numeric_limits<C>::infinity();
    C most = least;
    for_pieces([&](int64_t first, int64_t n) { most = std::max(most, piece.most(x + first, n)); });
    // A row of only -inf has no softmax: shifting by 0 then gives torch's nan instead of ours by -inf - -inf.
    shift = most == least ? C(0) : most;
    sum = 0;
    const T* const next = is_one() ? x + a.classes : nullptr;
    const T* const to = is_one() && a.grad_input ? gradient_of(x) : nullptr;
    for_pieces([&](int64_t first, int64_t n) { sum += piece.exponentials(x + first, n, is_one(), shift, next, to); });
  }

  // The gradient of the logits, after softmax() of that row.
  TORCHBP_INLINE void gradient(const Row<T>& row, C shift, double sum) {
    T* const to = gradient_of(row.x);
    if (row.ignored() || !row.in_range()) {
      std::fill_n(to, a.classes, T(0));
      return;
    }
    const C g = row.upstream(), hot = g * row.onehot(), scale = g * row.mass(OneThread()) * static_cast<C>(1 / sum);
    for_pieces([&](int64_t first, int64_t n) {
      if (!is_one()) piece.exponentials(row.x + first, n, false, shift, nullptr, to + first);
      const C* const p = piece.x;
      T* const dx = to + first;
      const auto soft = [&](int64_t j) { return g * (row.w(first + j) * row.soft(first + j)); };
      const int64_t target = row.target - first;
      if (row.has_soft()) {
#pragma GCC ivdep
        for (int64_t j = 0; j < n; ++j) store(dx + j, scale * p[j] - soft(j));
        if (target >= 0 && target < n) store(dx + target, scale * p[target] - soft(target) - hot);
      } else {
#pragma GCC ivdep
        for (int64_t j = 0; j < n; ++j) store(dx + j, scale * p[j]);
        if (target >= 0 && target < n) store(dx + target, scale * p[target] - hot);
      }
    });
  }

private:
  bool is_one() const { return a.classes <= piece.size; }
  T* gradient_of(const T* x) const { return static_cast<T*>(a.grad_input) + (x - static_cast<const T*>(a.input)); }
};

}  // namespace torchbp::TORCHBP_LEVEL
