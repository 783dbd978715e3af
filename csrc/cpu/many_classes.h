// Softmax cross-entropy of many classes on the CPU: vectors along a row, which passes through L1 in pieces.
//
// The formulas are those of softmax_ce.h.
#pragma once

#include <algorithm>

#include "../softmax_ce.h"

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

// A piece of a row in the compute dtype. Its loops run over whole vectors: behind the end stands -inf, whose exponential
// is 0.
template <class T>
struct Piece {
  using C = Compute<T>;
  static constexpr int width = TORCHBP_VECTOR / sizeof(C);
  static constexpr int64_t size = 2048, lanes = 4 * width;
  typedef C Vector __attribute__((vector_size(TORCHBP_VECTOR)));
  int64_t padded = 0;
  alignas(64) C x[size];

  TORCHBP_INLINE const Vector& vector(int64_t j) const { return reinterpret_cast<const Vector*>(x)[j]; }

  TORCHBP_INLINE void read(const T* from, int64_t n) {
    padded = (n + lanes - 1) / lanes * lanes;
    for (int64_t j = padded - lanes; j < padded; ++j) x[j] = -std::numeric_limits<C>::infinity();
    load_n(x, from, n);
  }

  // The largest, in each place of a vector; nan aside, unless it is first there.
  TORCHBP_INLINE C most() const {
    Vector m[4];
    for (int i = 0; i < 4; ++i) m[i] = vector(i);
    for (int64_t j = 4; j < padded / width; j += 4)
      for (int i = 0; i < 4; ++i) m[i] = vector(j + i) > m[i] ? vector(j + i) : m[i];
    for (int i = 1; i < 4; ++i) m[0] = m[i] > m[0] ? m[i] : m[0];
    C all = m[0][0];
    for (int k = 1; k < width; ++k) all = m[0][k] > all ? m[0][k] : all;
    return all;
  }

  TORCHBP_INLINE C sum() const {
    Vector s[4];
    for (int i = 0; i < 4; ++i) s[i] = vector(i);
    for (int64_t j = 4; j < padded / width; j += 4)
      for (int i = 0; i < 4; ++i) s[i] += vector(j + i);
    const Vector all = (s[0] + s[1]) + (s[2] + s[3]);
    C sums[width];
    memcpy(sums, &all, sizeof(all));
    for (int half = width / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    return sums[0];
  }

  TORCHBP_INLINE void exponentials(C shift) {
    for (int64_t j = 0; j < padded; ++j) x[j] = exp_to_one(x[j] - shift);
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
    const bool one = a.classes <= piece.size;
    C most = least;
    for_pieces([&](int64_t first, int64_t n) {
      piece.read(x + first, n);
      const C m = piece.most();
      most = m > most || isnan(m) ? m : most;
    });
    // A row of only -inf has no softmax: shifting by 0 then gives torch's nan instead of ours by -inf - -inf.
    shift = most == least ? C(0) : most;
    sum = 0;
    for_pieces([&](int64_t first, int64_t n) {
      if (!one) piece.read(x + first, n);
      piece.exponentials(shift);
      sum += piece.sum();
    });
  }

  // The gradient of the logits, after softmax() of that row.
  TORCHBP_INLINE void gradient(const Row<T>& row, C shift, double sum) {
    const bool ready = a.classes <= piece.size;
    T* const dx = static_cast<T*>(a.grad_input) + row.i * a.classes;
    if (row.ignored() || !row.in_range()) {
      std::fill_n(dx, a.classes, T(0));
      return;
    }
    const C g = row.upstream(), hot = g * row.onehot(), scale = g * row.mass(OneThread()) * static_cast<C>(1 / sum);
    for_pieces([&](int64_t first, int64_t n) {
      if (!ready) {
        piece.read(row.x + first, n);
        piece.exponentials(shift);
      }
      C* const d = piece.x;
      if (row.has_soft())
        for (int64_t j = 0; j < n; ++j) d[j] = scale * d[j] - g * (row.w(first + j) * row.soft(first + j));
      else
        for (int64_t j = 0; j < piece.padded; ++j) d[j] *= scale;
      if (row.target >= first && row.target < first + n) d[row.target - first] -= hot;
      store_n(dx + first, d, n);
    });
  }
};

}  // namespace torchbp::TORCHBP_LEVEL
