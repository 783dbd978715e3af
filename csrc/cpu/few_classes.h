// Softmax cross-entropy of few classes on the CPU: many rows side by side, one in each lane of the vectors.
//
// A row of ten numbers is shorter than a vector, and a sum over it would wait for each of its steps. So a block of rows
// is transposed to [classes][lanes] in a buffer that stays in L1; there maximum, exponential, sum and logarithm run over
// lanes, several vectors at a time so that none waits for another. The formulas are those of softmax_ce.h.
#pragma once

#include <algorithm>

#include "../softmax_ce.h"
#include "exponential.h"

namespace torchbp::TORCHBP_LEVEL {

// ---- transposing -------------------------------------------------------------------------------------------------

using Four = float __attribute__((vector_size(16)));

#if defined(__clang__)
#define TORCHBP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
using FourIndices = int32_t __attribute__((vector_size(16)));
#define TORCHBP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourIndices{__VA_ARGS__})
#endif

// to[j][i] = from[i][j] of four times four numbers; the strides are those of the rows.
TORCHBP_INLINE void transpose_tile(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Four row[4];
  for (int i = 0; i < 4; ++i) memcpy(&row[i], from + i * from_stride, sizeof(Four));
  const Four low01 = TORCHBP_SHUFFLE(row[0], row[1], 0, 4, 1, 5), high01 = TORCHBP_SHUFFLE(row[0], row[1], 2, 6, 3, 7);
  const Four low23 = TORCHBP_SHUFFLE(row[2], row[3], 0, 4, 1, 5), high23 = TORCHBP_SHUFFLE(row[2], row[3], 2, 6, 3, 7);
  const Four column[4] = {TORCHBP_SHUFFLE(low01, low23, 0, 1, 4, 5), TORCHBP_SHUFFLE(low01, low23, 2, 3, 6, 7),
                          TORCHBP_SHUFFLE(high01, high23, 0, 1, 4, 5), TORCHBP_SHUFFLE(high01, high23, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) memcpy(to + i * to_stride, &column[i], sizeof(Four));
}
#undef TORCHBP_SHUFFLE

// to[j][i] = from[i][j]. Tiles of a side that four does not divide overlap.
template <class C>
TORCHBP_INLINE void transpose(const C* from, int64_t rows, int64_t columns, C* to) {
  if constexpr (std::is_same_v<C, float>) {
    if (rows >= 4 && columns >= 4) {
      for (int64_t j = 0; j < columns; j += 4) {
        const int64_t column = std::min(j, columns - 4);
        for (int64_t i = 0; i < rows; i += 4) {
          const int64_t row = std::min(i, rows - 4);
          transpose_tile(from + row * columns + column, columns, to + column * rows + row, rows);
        }
      }
      return;
    }
  }
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) to[j * rows + i] = from[i * columns + j];
}

// As many rows of memory as there are lanes, or less, to lanes and back; the lanes of rows that are not there hold 0.
template <int kLanes, int kMost, class T>
TORCHBP_INLINE void to_lanes(const T* from, int64_t rows, int64_t classes, Compute<T>* lanes) {
  using C = Compute<T>;
  if constexpr (std::is_same_v<T, C>) {
    if (rows == kLanes) return transpose(from, kLanes, classes, lanes);
  }
  C buffer[kLanes * kMost];
  const int64_t n = rows * classes;
  load_n(buffer, from, n);
  std::fill(buffer + n, buffer + kLanes * classes, C(0));
  transpose(buffer, kLanes, classes, lanes);
}

template <int kLanes, int kMost, class T>
TORCHBP_INLINE void from_lanes(const Compute<T>* lanes, int64_t rows, int64_t classes, T* to) {
  using C = Compute<T>;
  if constexpr (std::is_same_v<T, C>) {
    if (rows == kLanes) return transpose(lanes, classes, kLanes, to);
  }
  C buffer[kLanes * kMost];
  transpose(lanes, classes, kLanes, buffer);
  store_n(to, buffer, rows * classes);
}

// ---- the block ---------------------------------------------------------------------------------------------------

// kLanes rows at most, of kMost classes at most.
template <class T, int kLanes, int kMost>
struct Lanes {
  static constexpr int lanes = kLanes;
  using C = Compute<T>;
  using Int = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  static constexpr int width = TORCHBP_VECTOR / sizeof(C), parts = kLanes / width;
  typedef C Part __attribute__((vector_size(TORCHBP_VECTOR)));
  typedef Int IntPart __attribute__((vector_size(TORCHBP_VECTOR)));

  // One number of each row, in as many registers as that takes.
  struct Vector {
    Part part[parts];
    TORCHBP_INLINE C* numbers() { return reinterpret_cast<C*>(part); }
  };

  const SoftmaxCE& a;
  const T* const weight;
  const C keep, smooth_each;
  const bool has_soft;  // whether w q has a part besides the one-hot one
  int64_t first = 0, rows = 0;
  Vector x[kMost];             // logits
  Vector p[kMost];             // probabilities, up to a factor of each row
  Vector wq[kMost];            // w q without its one-hot part, if it has another
  Vector x_target, onehot;     // x and the one-hot part of w q where the target is
  Vector mass;                 // sum of w q
  Vector shift, sum, log_sum;  // the largest x, the sum of exp(x - shift) and its logarithm
  IntPart target[parts];       // -1 for a row of probabilities
  IntPart counts[parts];       // false for a row that is ignored or not there

  TORCHBP_INLINE explicit Lanes(const SoftmaxCE& a)
      : a(a),
        weight(static_cast<const T*>(a.weight)),
        keep(static_cast<C>(1 - a.label_smoothing)),
        smooth_each(static_cast<C>(a.label_smoothing / static_cast<double>(a.classes))),
        has_soft(a.soft || a.label_smoothing != 0) {}

  TORCHBP_INLINE C w(int64_t c) const { return weight ? load(weight[c]) : C(1); }

#define TORCHBP_PARTS for (int i = 0; i < parts; ++i)

  TORCHBP_INLINE void read(int64_t row, int64_t n) {
    first = row;
    rows = n;
    to_lanes<kLanes, kMost>(static_cast<const T*>(a.input) + first * a.classes, rows, a.classes, x->numbers());
    Int* const t = reinterpret_cast<Int*>(target);
    Int* const there = reinterpret_cast<Int*>(counts);
    for (int k = 0; k < kLanes; ++k) t[k] = -1;
    for (int k = 0; k < kLanes; ++k) there[k] = k < rows ? -1 : 0;
    if (!a.soft) {
      for (int k = 0; k < rows; ++k)
        t[k] = a.target[first + k] == a.ignore_index ? Int(-1) : static_cast<Int>(a.target[first + k]);
      TORCHBP_PARTS counts[i] = target[i] >= 0;
    }
    Vector of_x{}, of_w{};
    if (!a.soft)
      for (int64_t c = 0; c < a.classes; ++c) TORCHBP_PARTS {
          const IntPart here = target[i] == static_cast<Int>(c);
          of_x.part[i] = here ? x[c].part[i] : of_x.part[i];
          of_w.part[i] = here ? keep * w(c) + Part{} : of_w.part[i];
        }
    x_target = of_x;
    mass = onehot = of_w;
    if (!has_soft) return;
    if (a.soft)
      to_lanes<kLanes, kMost>(static_cast<const T*>(a.probabilities) + first * a.classes, rows, a.classes,
                              wq->numbers());
    for (int64_t c = 0; c < a.classes; ++c)
      TORCHBP_PARTS wq[c].part[i] = w(c) * ((a.soft ? keep * wq[c].part[i] : Part{}) + smooth_each);
    add_over_classes(mass, [&](int64_t c, int i) -> Part { return wq[c].part[i]; });
  }

  // total += the sum of term(c, i), part i of a class. In blocks: one running sum over a hundred classes would lose two
  // digits.
  template <class F>
  TORCHBP_INLINE void add_over_classes(Vector& total, const F& term) const {
    for (int64_t first = 0; first < a.classes; first += 8) {
      Vector block{};
      for (int64_t c = first; c < std::min(first + 8, a.classes); ++c) TORCHBP_PARTS block.part[i] += term(c, i);
      TORCHBP_PARTS total.part[i] += block.part[i];
    }
  }

  // p = exp(x - shift) with shift the largest x of each row.
  TORCHBP_INLINE void exponentials() {
    Vector most = x[0];
    for (int64_t c = 1; c < a.classes; ++c)
      TORCHBP_PARTS most.part[i] = x[c].part[i] > most.part[i] ? x[c].part[i] : most.part[i];
    // A row of only -inf has no softmax: shifting by 0 then gives torch's nan instead of ours by -inf - -inf.
    TORCHBP_PARTS shift.part[i] = most.part[i] == -std::numeric_limits<C>::infinity() ? Part{} : most.part[i];
    for (int64_t c = 0; c < a.classes; ++c) TORCHBP_PARTS p[c].part[i] = exp_to_one_of<C>(x[c].part[i] - shift.part[i]);
    sum = Vector{};
    add_over_classes(sum, [&](int64_t c, int i) -> Part { return p[c].part[i]; });
  }

  TORCHBP_INLINE void logarithms() {
    for (int k = 0; k < kLanes; ++k) log_sum.numbers()[k] = log(sum.numbers()[k]);
  }

  TORCHBP_INLINE void write_loss(Vector& lost) const { store_n(static_cast<T*>(a.loss) + first, lost.numbers(), rows); }
  TORCHBP_INLINE void write_lse() const {
    Vector lse;
    TORCHBP_PARTS lse.part[i] = shift.part[i] + log_sum.part[i];
    std::copy_n(lse.numbers(), rows, static_cast<C*>(a.lse) + first);
  }

  // What each row loses, 0 where it does not count; lse = shift + log_sum.
  TORCHBP_INLINE void loss(Vector& lost) const {
    TORCHBP_PARTS lost.part[i] = onehot.part[i] * ((shift.part[i] - x_target.part[i]) + log_sum.part[i]);
    if (a.soft) lost = Vector{};
    if (has_soft)
      add_over_classes(lost, [&](int64_t c, int i) -> Part {
        return wq[c].part[i] * ((shift.part[i] - x[c].part[i]) + log_sum.part[i]);
      });
    TORCHBP_PARTS lost.part[i] = counts[i] ? lost.part[i] : Part{};
  }

  // Turns p into the gradient g (p / sum * mass - w q), g = dloss / total, and writes it.
  TORCHBP_INLINE void gradient() {
    Vector g{}, factor, hot;
    if (a.grad_stride == 0)
      TORCHBP_PARTS g.part[i] += Row<T>(a, first).upstream();
    else
      for (int k = 0; k < rows; ++k) g.numbers()[k] = Row<T>(a, first + k).upstream();
    TORCHBP_PARTS {
      factor.part[i] = g.part[i] * mass.part[i] / sum.part[i];
      hot.part[i] = g.part[i] * onehot.part[i];
    }
    for (int64_t c = 0; c < a.classes; ++c) TORCHBP_PARTS {
        Part d = p[c].part[i] * factor.part[i];
        d -= target[i] == static_cast<Int>(c) ? hot.part[i] : Part{};
        if (has_soft) d -= g.part[i] * wq[c].part[i];
        p[c].part[i] = counts[i] ? d : Part{};
      }
    from_lanes<kLanes, kMost>(p->numbers(), rows, a.classes, static_cast<T*>(a.grad_input) + first * a.classes);
  }
};
#undef TORCHBP_PARTS

}  // namespace torchbp::TORCHBP_LEVEL
