// Softmax cross-entropy of few classes on the CPU: many rows side by side, one in each lane of the vectors.
//
// A row of ten numbers is shorter than a vector, and a sum over it would wait for each of its steps. So a block of rows
// is transposed to [classes][lanes] in a buffer that stays in L1; there maximum, exponential, sum and logarithm run over
// lanes, several vectors at a time so that none waits for another. On the way to lanes the largest logit and the target's
// are picked out, and on the way back the gradient is made. The formulas are those of softmax_ce.h.
#pragma once

#include <algorithm>

#include "../softmax_ce.h"
#include "exponential.h"

namespace torchbp::TORCHBP_LEVEL {

// ---- transposing -------------------------------------------------------------------------------------------------

// A few columns of as many rows as a vector has numbers: read from rows of memory, turned, and the other way round.
//
// A piece of 16 bytes of a row is a number of each column. Vector i holds the pieces of the rows i, i + columns,
// i + 2 columns, ...: turned within each 16 bytes, vector i holds column i of all rows, in order.
template <class C>
struct Tile {
  static constexpr int columns = 16 / sizeof(C), rows = TORCHBP_VECTOR / sizeof(C), pieces = TORCHBP_VECTOR / 16;
  typedef C Vector __attribute__((vector_size(TORCHBP_VECTOR)));
  typedef __int128 Piece;  // of these, as of nothing else, compilers make single instructions of loads and stores
  typedef __int128 Pieces __attribute__((vector_size(TORCHBP_VECTOR)));
  using Lanes = std::make_integer_sequence<int, rows>;

  Vector v[columns];

  TORCHBP_INLINE void read(const C* from, int64_t stride) {
    for (int i = 0; i < columns; ++i)
      v[i] = gather(from + i * stride, columns * stride, std::make_integer_sequence<int, pieces>());
  }
  TORCHBP_INLINE void write(C* to, int64_t stride) const {
    for (int k = 0; k < pieces; ++k)  // row after row
      for (int i = 0; i < columns; ++i)
        memcpy(to + (i + k * columns) * stride, reinterpret_cast<const char*>(&v[i]) + k * 16, 16);
  }
  // Its own inverse.
  TORCHBP_INLINE void turn() {
    if constexpr (columns == 2) {
      const Vector a = v[0], b = v[1];
      v[0] = interleave<1, 0>(a, b, Lanes()), v[1] = interleave<1, 1>(a, b, Lanes());
    } else {
      const Vector low01 = interleave<1, 0>(v[0], v[1], Lanes()), high01 = interleave<1, 1>(v[0], v[1], Lanes());
      const Vector low23 = interleave<1, 0>(v[2], v[3], Lanes()), high23 = interleave<1, 1>(v[2], v[3], Lanes());
      v[0] = interleave<2, 0>(low01, low23, Lanes()), v[1] = interleave<2, 1>(low01, low23, Lanes());
      v[2] = interleave<2, 0>(high01, high23, Lanes()), v[3] = interleave<2, 1>(high01, high23, Lanes());
    }
  }

private:
  TORCHBP_INLINE static Piece piece(const C* from) {
    Piece p;
    memcpy(&p, from, sizeof(p));
    return p;
  }
  template <int... k>
  TORCHBP_INLINE static Vector gather(const C* from, int64_t step, std::integer_sequence<int, k...>) {
    return (Vector)Pieces{piece(from + k * step)...};
  }
  // Of the low or high half of each 16 bytes: `unit` numbers of a, as many of b, ...
  template <int unit, int half, int... lane>
  TORCHBP_INLINE static Vector interleave(Vector a, Vector b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b,
                                   (lane / unit % 2 * rows + lane / columns * columns + half * columns / 2 +
                                    lane % columns / (2 * unit) * unit + lane % unit)...);
  }
};

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
  const bool narrow;    // whether a tile has more columns than there are classes
  int64_t first = 0, rows = 0;
  Vector x[kMost];             // logits
  Vector p[kMost];             // probabilities, up to a factor of each row
  Vector wq[kMost];            // w q without its one-hot part, if it has another
  Vector x_target, onehot;     // x and the one-hot part of w q where the target is
  Vector mass;                 // sum of w q
  Vector shift, sum, log_sum;  // the largest x, the sum of exp(x - shift) and its logarithm
  IntPart target[parts];       // -1 for a row of probabilities, or one that does not count
  IntPart counts[parts];       // false for a row that is ignored or not there
  C buffer[kLanes * kMost];    // rows of another dtype, or less rows than there are lanes

  TORCHBP_INLINE explicit Lanes(const SoftmaxCE& a)
      : a(a),
        weight(static_cast<const T*>(a.weight)),
        keep(static_cast<C>(1 - a.label_smoothing)),
        smooth_each(static_cast<C>(a.label_smoothing / static_cast<double>(a.classes))),
        has_soft(a.soft || a.label_smoothing != 0),
        narrow(a.classes < Tile<C>::columns) {}

  TORCHBP_INLINE C w(int64_t c) const { return weight ? load(weight[c]) : C(1); }

#define TORCHBP_PARTS for (int i = 0; i < parts; ++i)

  // The rows of a matrix: where they are, or in the buffer, with 0 in those that are not there. A narrow tile reads on
  // behind the last row, which has to be memory of the matrix or of the buffer.
  TORCHBP_INLINE const C* rows_of(const void* matrix) {
    const T* const from = static_cast<const T*>(matrix) + first * a.classes;
    if constexpr (std::is_same_v<T, C>) {
      const bool ends = narrow && (a.n - first - rows) * a.classes < Tile<C>::columns;
      if (rows == kLanes && !ends) return from;
    }
    const int64_t n = rows * a.classes;
    load_n(buffer, from, n);
    std::fill(buffer + n, buffer + kLanes * a.classes, C(0));
    return buffer;
  }

  // f(c, column c) of part i of the rows, for each class c. The tiles of a number of classes that they do not divide
  // overlap.
  template <class F>
  TORCHBP_INLINE void for_columns(const C* from, int i, const F& f) const {
    from += i * width * a.classes;
    Tile<C> tile;
    if (narrow) {
      tile.read(from, a.classes);
      tile.turn();
      for (int k = 0; k < tile.columns; ++k)
        if (k < a.classes) f(k, tile.v[k]);
      return;
    }
    for (int64_t j = 0; j < a.classes; j += tile.columns) {
      const int64_t c = std::min<int64_t>(j, a.classes - tile.columns);
      tile.read(from + c, a.classes);
      tile.turn();
      for (int k = 0; k < tile.columns; ++k) f(c + k, tile.v[k]);
    }
  }

  // The way back: column c of part i becomes f(c). A narrow tile writes on behind each row, before the row that is there.
  template <class F>
  TORCHBP_INLINE void write_columns(C* to, int i, const F& f) const {
    to += i * width * a.classes;
    Tile<C> tile;
    if (narrow) {
      for (int k = 0; k < tile.columns; ++k) tile.v[k] = k < a.classes ? f(k) : Part{};
      tile.turn();
      tile.write(to, a.classes);
      return;
    }
    for (int64_t j = 0; j < a.classes; j += tile.columns) {
      const int64_t c = std::min<int64_t>(j, a.classes - tile.columns);
      for (int k = 0; k < tile.columns; ++k) tile.v[k] = f(c + k);
      tile.turn();
      tile.write(to + c, a.classes);
    }
  }

  TORCHBP_INLINE void read(int64_t row, int64_t n) {
    first = row;
    rows = n;
    read_targets();
    const C* const from = rows_of(a.input);
    TORCHBP_PARTS {
      constexpr C least = -std::numeric_limits<C>::infinity();
      const IntPart t = target[i];
      Part most = least + Part{}, of_x{};
      for_columns(from, i, [&](int64_t c, Part here) {
        x[c].part[i] = here;
        most = here > most ? here : most;
        of_x = t == static_cast<Int>(c) ? here : of_x;
      });
      // A row of only -inf has no softmax: shifting by 0 then gives torch's nan instead of ours by -inf - -inf.
      shift.part[i] = most == least ? Part{} : most;
      x_target.part[i] = of_x;
    }
    mass = onehot;
    if (!has_soft) return;
    if (a.soft) {
      const C* const q = rows_of(a.probabilities);
      TORCHBP_PARTS for_columns(q, i, [&](int64_t c, Part q) { wq[c].part[i] = w(c) * (keep * q + smooth_each); });
    } else {
      for (int64_t c = 0; c < a.classes; ++c) TORCHBP_PARTS wq[c].part[i] = w(c) * smooth_each + Part{};
    }
    add_over_classes(mass, [&](int64_t c, int i) -> Part { return wq[c].part[i]; });
  }

  TORCHBP_INLINE void read_targets() {
    Int* const t = reinterpret_cast<Int*>(target);
    TORCHBP_PARTS target[i] = IntPart{} - 1;
    if (a.soft) {
      for (int k = 0; k < kLanes; ++k) reinterpret_cast<Int*>(counts)[k] = k < rows ? -1 : 0;
      onehot = Vector{};
      return;
    }
    const int64_t* const from = a.target + first;
    const int64_t classes = a.classes, ignored = a.ignore_index;
    const auto read = [&](int k) {
      const bool kept = (from[k] != ignored) & (static_cast<uint64_t>(from[k]) < static_cast<uint64_t>(classes));
      t[k] = kept ? static_cast<Int>(from[k]) : Int(-1);
    };
    if (rows == kLanes)
      for (int k = 0; k < kLanes; ++k) read(k);
    else
      for (int k = 0; k < rows; ++k) read(k);
    TORCHBP_PARTS {
      counts[i] = target[i] >= 0;
      onehot.part[i] = counts[i] ? keep + Part{} : Part{};
    }
    if (weight)
      for (int k = 0; k < rows; ++k)
        if (t[k] >= 0) onehot.numbers()[k] *= w(t[k]);
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

  // p = exp(x - shift).
  TORCHBP_INLINE void exponentials() {
    for (int64_t c = 0; c < a.classes; ++c) {
      if constexpr (kHasRoots<C>) {
        TORCHBP_PARTS p[c].part[i] = exp_to_one_of<C>(x[c].part[i] - shift.part[i]);
      } else {  // one loop of scalars, which compilers vectorise
        for (int k = 0; k < kLanes; ++k) p[c].numbers()[k] = exp_to_one(x[c].numbers()[k] - shift.numbers()[k]);
      }
    }
    sum = Vector{};
    add_over_classes(sum, [&](int64_t c, int i) -> Part { return p[c].part[i]; });
  }

  TORCHBP_INLINE void logarithms() {
    for (int k = 0; k < kLanes; ++k) log_sum.numbers()[k] = log(sum.numbers()[k]);
  }

  // Adds to `sums`, one of each lane of a part, what rows of class indices without weights lose. The logarithms of a lane
  // are that of a product: a sum is at most kMost.
  TORCHBP_INLINE void add_plain_losses(double* sums) const {
    static_assert(parts * (kMost <= 32 ? 5 : 7) < std::numeric_limits<C>::max_exponent && kMost <= 128);
    Vector below;
    Part product = Part{} + 1;
    TORCHBP_PARTS {
      below.part[i] = counts[i] ? shift.part[i] - x_target.part[i] : Part{};
      product *= counts[i] ? sum.part[i] : Part{} + 1;
    }
    add_to(sums, below);
    const C* const products = reinterpret_cast<const C*>(&product);
    for (int k = 0; k < width; ++k) sums[k] += log(products[k]);
  }

  TORCHBP_INLINE static void add_to(double* sums, Vector of) {
    TORCHBP_PARTS for (int k = 0; k < width; ++k) sums[k] += of.numbers()[i * width + k];
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

  // Writes the gradient g (p / sum * mass - w q), g = dloss / total.
  TORCHBP_INLINE void gradient() {
    Vector upstream;
    const C all = a.grad_stride == 0 ? Row<T>(a, first).upstream() : C(0);
    TORCHBP_PARTS upstream.part[i] = all + Part{};
    if (a.grad_stride != 0)
      for (int k = 0; k < rows; ++k) upstream.numbers()[k] = Row<T>(a, first + k).upstream();
    T* const to = static_cast<T*>(a.grad_input) + first * a.classes;
    C* through = buffer;
    if constexpr (std::is_same_v<T, C>) {
      if (rows == kLanes && !narrow) through = to;
    }
    TORCHBP_PARTS {
      const Part g = upstream.part[i], factor = g * mass.part[i] / sum.part[i], hot = g * onehot.part[i];
      const IntPart t = target[i], there = counts[i];
      const auto plain = [&](int64_t c) -> Part {
        return p[c].part[i] * factor - (t == static_cast<Int>(c) ? hot : Part{});
      };
      if (has_soft)
        write_columns(through, i, [&](int64_t c) -> Part { return there ? plain(c) - g * wq[c].part[i] : Part{}; });
      else
        write_columns(through, i, [&](int64_t c) -> Part { return there ? plain(c) : Part{}; });
    }
    if (through == buffer) store_n(to, buffer, rows * a.classes);
  }
};
#undef TORCHBP_PARTS

}  // namespace torchbp::TORCHBP_LEVEL
