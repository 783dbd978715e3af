// What the products of gemm.h are made of, for one SIMD level: tiles, copies of blocks, what is fetched ahead, and what
// follows a product.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "update.h"

namespace torchbp::TORCHBP_LEVEL {

// A vector of some lanes, and one that may stand anywhere in memory.
template <int lanes>
struct Vectors {
  typedef float Type __attribute__((vector_size(4 * lanes)));
  typedef float Unaligned __attribute__((vector_size(4 * lanes), aligned(1), may_alias));
};

// What A and B are multiplied in: a float, or as many elements that follow each other along k.
typedef float Word __attribute__((may_alias));
template <class T>
constexpr int64_t kStep = static_cast<int64_t>(sizeof(Word) / sizeof(T));

// Elements that are words may be read and left where they lie; pairs are always copied.
template <class T>
constexpr bool kIsWord = std::is_same_v<T, float>;

// A register of the level, and half of one where that takes half the time: on Zen 4, whose units are 256 bits wide.
constexpr int kLanes = TORCHBP_VECTOR / 4, kLeast = kLanes > 8 ? 8 : kLanes;
using Vector = Vectors<kLanes>::Type;
using Least = Vectors<kLeast>::Type;

// Accumulators of 14 x 2 of 32 registers, or 6 x 2 of 16: the rest hold the panel's row and a broadcast.
constexpr bool kManyRegisters = TORCHBP_VECTOR == 64;
constexpr int kTileRows = kManyRegisters ? 14 : 6;
constexpr int kPanel = 2 * kLanes;
constexpr int64_t kBlock = 256;              // words of K: a tile of A fits L1 beside the panel that streams by
constexpr int64_t kRowStride = kBlock + 16;  // of A's rows once copied: not a power of two, which would share L1 sets
constexpr int64_t kColumnStride = kManyRegisters ? 16 : 8;  // of A's columns once copied
// Whether rows of A are copied by columns, and such a tile takes two or four steps of k at a time. A step of AVX2 has 12
// multiply-adds among 24 instructions, of which a core takes three in a cycle while another thread keeps it busy: with
// fewer and shorter ones, products are 1.03 to 1.11 times as fast on such a core, and 1.02 to 1.06 times on their own.
constexpr bool kByColumns = !kManyRegisters;
constexpr int64_t kCopy = std::max(kTileRows * kRowStride, kBlock* kColumnStride);
constexpr int64_t kPanelBytes = 256 * 1024;  // of B that is to stay in L2 while tiles of A pass
constexpr int64_t kNear = 8 * 1024;          // numbers of an operand that stays in L1 as it is
constexpr int64_t kFewRows = 128;            // of A: a copy of B is not repaid by as few
constexpr int64_t kHeld = 72 * 1024;         // numbers of unfinished C that are to stay in L2
constexpr int64_t kLongRun = 256;            // numbers of a row of C, of which a tile's are to stay in L1
constexpr int64_t kUpdateRun = 512;          // numbers of a row of C that are updated at a time
constexpr int64_t kCached = (kManyRegisters ? 64 : 1024) * 1024;  // numbers of a product for which nothing is fetched
constexpr int kStepsOfLine = kManyRegisters ? 1 : 4;              // steps of a tile for each line that it fetches

template <class V = Vector>
TORCHBP_INLINE V load_vector(const void* p) {
  return *static_cast<const typename Vectors<sizeof(V) / 4>::Unaligned*>(p);
}
template <class V>
TORCHBP_INLINE void store_vector(float* p, V v) {
  *reinterpret_cast<typename Vectors<sizeof(V) / 4>::Unaligned*>(p) = v;
}

// x in every lane: one load. V{} + x would add, as 0 + -0 is not -0.
template <class V, size_t... l>
TORCHBP_INLINE V broadcast(const Word& x, std::index_sequence<l...>) {
  return V{(static_cast<void>(l), x)...};
}
template <class V = Vector>
TORCHBP_INLINE V broadcast(const Word& x) {
  return broadcast<V>(x, std::make_index_sequence<sizeof(V) / 4>());
}

// What vectors of words are, for each type that a level has products of.
template <class T>
struct Words;

template <>
struct Words<float> {
  template <class V>
  static TORCHBP_INLINE V multiply_add(V a, V b, V sum) {
    return sum + a * b;
  }
  // The words of columns side by side; those of a k and the next. There is no next where not `whole`.
  static TORCHBP_INLINE Vector of_columns(const float* from, int64_t /*k_stride*/, bool /*whole*/) {
    return load_vector(from);
  }
};

// As many lines of memory as a tile has rows at most, `stride` bytes apart.
struct Lines {
  const char* first;
  int64_t stride;
};

// How a tile's operands lie: A by rows or by columns; or both as copy_a, by columns, and copy_b leave them, in strides
// that the compiler knows: so a step of AVX2 has 21 instructions and not 23, and x W^T of 128 x 3072 to 512 takes 0.93
// to 0.99 of the time, on a core that another thread keeps busy and on its own.
enum class Lie { rows, columns, copies };

// What multiply_tile computes: to [mr][to_stride] (+)= A B over kc words, with A [mr][a_stride] (by rows) or
// [kc][a_stride] and B [kc][b_stride]. Members begin without values: to clear them, g++ calls on microcode, which takes
// a twentieth of a step of a small network.
struct TileProduct {
  int64_t kc;
  bool first;  // or there is a sum in `to`
  const Word *a, *b;
  float* to;
  int64_t a_stride, b_stride, to_stride;
  const void* bias_of_rows;      // to be added in the end, or null
  const float* bias_of_columns;  // the same, of the columns that the tile has
  const PlainSgd* update;        // the product is the gradient of what `to` holds, which is updated; or null
  const Lines* fetch;            // lines to be fetched meanwhile, from the first steps on
  int64_t fetches;               // how many times kTileRows
};

// `to` becomes the sums, or is moved by them.
template <bool updates, class V, int mr, int vectors>
TORCHBP_INLINE void store_rows(const TileProduct& t, const V (&sum)[mr][vectors]) {
  constexpr int lanes = sizeof(V) / 4;
  float* to = t.to;
  asm("" : "+r"(to));  // or its rows' addresses are kept from the sums' load on, in registers that the loop has not
  [[maybe_unused]] const PlainSgd rule = updates ? *t.update : PlainSgd(Update());
#pragma GCC unroll 16
  for (int i = 0; i < mr; ++i, to += t.to_stride)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      V value = sum[i][v];
      if constexpr (updates) value = rule.moved(load_vector<V>(to + v * lanes), value);
      store_vector(to + v * lanes, value);
    }
}

// In as many vectors of type V as cover a panel's columns. Where nothing is fetched, no register is kept for it.
template <class T, class V, int vectors, Lie lie, bool fetches, int mr>
void multiply_tile(const TileProduct& t) {
  constexpr int lanes = sizeof(V) / 4;
  V sum[mr][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < mr; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sum[i][v] = t.first ? V{} : load_vector<V>(t.to + i * t.to_stride + v * lanes);
  const Word *a = t.a, *b = t.b;
  const int64_t a_row = lie == Lie::rows ? t.a_stride : 1;
  const int64_t a_step = lie == Lie::rows ? 1 : lie == Lie::columns ? t.a_stride : kColumnStride;
  const int64_t b_step = lie == Lie::copies ? kPanel : t.b_stride;
  const auto step = [&]() __attribute__((always_inline)) {
    V row[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) row[v] = load_vector<V>(b + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < mr; ++i) {
      const V factor = broadcast<V>(a[i * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[i][v] = Words<T>::multiply_add(factor, row[v], sum[i][v]);
    }
    a += a_step;
    b += b_step;
  };
  int64_t k = t.kc;
  if constexpr (fetches)
    for (const Lines *lines = t.fetch, *end = lines + t.fetches; lines < end; ++lines) {
      const char* line = lines->first;
      for (int64_t l = 0, stride = lines->stride; l < kTileRows; ++l, line += stride) {
        __builtin_prefetch(line);
#pragma GCC unroll 4
        for (int s = 0; s < kStepsOfLine; ++s) step();
      }
      k -= kTileRows * kStepsOfLine;
    }
  constexpr int together = !kByColumns || lie == Lie::rows ? 1 : lie == Lie::columns ? 2 : 4;
  for (; k >= together; k -= together)
#pragma GCC unroll 4
    for (int s = 0; s < together; ++s) step();
  for (; k > 0; --k) step();
  if (const T* const bias = static_cast<const T*>(t.bias_of_rows)) {
#pragma GCC unroll 16
    for (int i = 0; i < mr; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[i][v] += broadcast<V>(load(bias[i]));
  }
  if (t.bias_of_columns) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const V bias = load_vector<V>(t.bias_of_columns + v * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < mr; ++i) sum[i][v] += bias;
    }
  }
  if (t.update)
    store_rows<true>(t, sum);
  else
    store_rows<false>(t, sum);
}

using MultiplyTile = void (*)(const TileProduct&);

template <class T, class V, int vectors, Lie lie, bool fetches, int... rows>
constexpr std::array<MultiplyTile, sizeof...(rows)> tiles_of(std::integer_sequence<int, rows...>) {
  return {multiply_tile<T, V, vectors, lie, fetches, rows + 1>...};
}

template <class T, class V, int vectors, Lie lie, bool fetches = false>
constexpr auto kMultiply = tiles_of<T, V, vectors, lie, fetches>(std::make_integer_sequence<int, kTileRows>());

// Columns that are computed where a panel has `columns`.
inline int64_t width_of(int64_t columns) { return columns <= kLeast ? kLeast : columns <= kLanes ? kLanes : kPanel; }

// Whether a panel, or some side by side, are as wide as what is computed.
inline bool is_full(int64_t columns) {
  const int64_t rest = columns % kPanel;
  return rest == 0 || rest == width_of(rest);
}

// The tile of a whole panel.
template <class T, bool fetches = false>
MultiplyTile multiply_for(int64_t rows, Lie lie) {
  const int64_t i = rows - 1;
  if constexpr (kByColumns)
    if (lie == Lie::copies) return kMultiply<T, Vector, 2, Lie::copies, fetches>[i];
  return lie == Lie::rows ? kMultiply<T, Vector, 2, Lie::rows, fetches>[i]
                          : kMultiply<T, Vector, 2, Lie::columns, fetches>[i];
}

// Of one that has fewer columns, maybe.
template <class T>
MultiplyTile multiply_for(int64_t rows, Lie lie, int64_t columns) {
  const int64_t width = width_of(columns), i = rows - 1;
  const bool by_rows = lie == Lie::rows;
  if (width == kPanel) return multiply_for<T>(rows, lie);
  if (width == kLanes)
    return by_rows ? kMultiply<T, Vector, 1, Lie::rows>[i] : kMultiply<T, Vector, 1, Lie::columns>[i];
  return by_rows ? kMultiply<T, Least, 1, Lie::rows>[i] : kMultiply<T, Least, 1, Lie::columns>[i];
}

// ---- words of elements --------------------------------------------------------------------------------------------

template <class T>
constexpr int64_t words(int64_t elements) {
  return (elements + kStep<T> - 1) / kStep<T>;
}

// A block of K in elements: whole words and, at the end of K, what does not fill another.
template <class T>
struct BlockOfK {
  BlockOfK(int64_t all, int64_t first_word, int64_t words)
      : begin(first_word * kStep<T>),
        size(std::min(words * kStep<T>, all - begin)),
        words(size / kStep<T>),
        rest(size % kStep<T>) {}
  int64_t begin, size, words, rest;
};

template <class T>
TORCHBP_INLINE Word load_word(const T* p) {
  float word;
  __builtin_memcpy(&word, p, sizeof(word));
  return word;
}

// to [words(count)][to_stride] = the words of `columns` columns of `count` elements, that may lie anywhere in memory;
// with zeros beside the last of an odd number.
template <class T>
void copy_elements(const T* from, int64_t k_stride, int64_t column_stride, int64_t count, int64_t columns, Word* to,
                   int64_t to_stride) {
  for (int64_t k = 0; k < count; k += kStep<T>)
    for (int64_t c = 0; c < columns; ++c) {
      T word[kStep<T>] = {};
      for (int64_t s = 0; s < std::min(kStep<T>, count - k); ++s)
        word[s] = from[(k + s) * k_stride + c * column_stride];
      to[k / kStep<T> * to_stride + c] = load_word(word);
    }
}

// ---- transposition ------------------------------------------------------------------------------------------------

// Lanes of (a, b) in which bit d of the lane's number picks: b's lower half beside a's, or the upper ones.
template <int d, class V, size_t... l>
TORCHBP_INLINE V lower(V a, V b, std::index_sequence<l...>) {
  return __builtin_shufflevector(a, b, ((l & d) ? sizeof...(l) + l - d : l)...);
}
template <int d, class V, size_t... l>
TORCHBP_INLINE V upper(V a, V b, std::index_sequence<l...>) {
  return __builtin_shufflevector(a, b, ((l & d) ? sizeof...(l) + l : l + d)...);
}

template <int d, class V, size_t lanes>
TORCHBP_INLINE void transpose_stage(V (&row)[lanes]) {
  constexpr auto all = std::make_index_sequence<lanes>();
#pragma GCC unroll 16
  for (size_t i = 0; i < lanes; ++i) {
    if (i & d) continue;
    const V a = row[i], b = row[i + d];
    row[i] = lower<d>(a, b, all);
    row[i + d] = upper<d>(a, b, all);
  }
}

// The sums of the lanes of as many vectors as a vector has lanes: a transposition that adds.
template <int d>
TORCHBP_INLINE void add_stage(Vector (&row)[kLanes]) {
  constexpr auto all = std::make_index_sequence<kLanes>();
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2 * d)
    row[i] = lower<d>(row[i], row[i + d], all) + upper<d>(row[i], row[i + d], all);
}
TORCHBP_INLINE Vector sum_lanes(Vector (&row)[kLanes]) {
  add_stage<1>(row);
  add_stage<2>(row);
  if constexpr (kLanes > 4) add_stage<4>(row);
  if constexpr (kLanes > 8) add_stage<8>(row);
  return row[0];
}

// to [k][to_stride] = transpose of from [rows][from_stride]: a square of words.
template <int lanes, class T>
TORCHBP_INLINE void transpose_square(const T* from, int64_t from_stride, Word* to, int64_t to_stride) {
  using V = typename Vectors<lanes>::Type;
  V row[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) row[i] = load_vector<V>(from + i * from_stride);
  transpose_stage<1>(row);
  transpose_stage<2>(row);
  if constexpr (lanes > 4) transpose_stage<4>(row);
  if constexpr (lanes > 8) transpose_stage<8>(row);
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) store_vector(to + i * to_stride, row[i]);
}

// to [columns][to_stride] = transpose of from [rows][from_stride], in words: in the largest squares that fit, of which
// the last overlap.
template <int lanes = kLanes, class T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, Word* to, int64_t to_stride) {
  if (rows >= lanes && columns >= lanes) {
    for (int64_t i = 0; i < rows; i += lanes)
      for (int64_t j = 0; j < columns; j += lanes) {
        const int64_t r = std::min(i, rows - lanes), c = std::min(j, columns - lanes);
        transpose_square<lanes>(from + r * from_stride + c * kStep<T>, from_stride, to + c * to_stride + r, to_stride);
      }
  } else if constexpr (lanes > 4) {
    transpose<lanes / 2>(from, from_stride, rows, columns, to, to_stride);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = load_word(from + r * from_stride + c * kStep<T>);
  }
}

// to [n] = from [n], in words: in vectors, of which the last overlap.
template <class V = Vector, class T>
TORCHBP_INLINE void copy_run(const T* from, int64_t n, Word* to) {
  constexpr int lanes = sizeof(V) / 4;
  if (n >= lanes) {
    for (int64_t i = 0; i < n; i += lanes) {
      const int64_t at = std::min(i, n - lanes);
      store_vector(to + at, load_vector<V>(from + at * kStep<T>));
    }
  } else if constexpr (lanes > 4) {
    copy_run<typename Vectors<lanes / 2>::Type>(from, n, to);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = load_word(from + i * kStep<T>);
  }
}

// ---- copies of blocks ----------------------------------------------------------------------------------------------

// Rows of B that lie a KiB or two apart share L1 sets, so that each tile of A would fetch them from L2. 512 x 512 x 512
// is 1.2 times as fast with a copy, on AVX2, and dz W of 64 examples and 3072 outputs to 512 inputs 1.35 times.
template <class T>
bool reads_b_in_place(const Gemm& g, int64_t rows) {
  if (!kIsWord<T> || g.b_j != 1 || !is_full(g.n)) return false;
  if (rows <= kTileRows) return true;
  return kManyRegisters ? g.b_k <= 2 * kBlock : rows <= kFewRows && g.b_k <= (g.k <= kBlock ? 2 : 1) * kBlock;
}

// Whether multiply_tile may read A where it is: a copy is repaid by many panels, if at all. Rows or columns that lie
// further apart would share L1 sets; to find them in memory takes half a vector's multiplication as long again.
template <class T>
bool reads_a_in_place(const Gemm& g, int64_t panels) {
  if (!kIsWord<T>) return false;
  if (g.a_i == 1) return panels == 1 || (panels == 2 && g.a_k <= kBlock) || g.k * g.a_k <= kNear;
  return g.a_k == 1 && g.a_i <= kBlock && (panels == 1 || (panels == 2 && g.n % kPanel == 0) || g.m * g.a_i <= kNear);
}

// to [words][to_stride] = the words of a block of `columns` columns, each of which is a run in memory.
template <class T>
void copy_runs(const T* from, int64_t column_stride, int64_t columns, const BlockOfK<T>& block, Word* to,
               int64_t to_stride) {
  transpose(from, column_stride, columns, block.words, to, to_stride);
  copy_elements(from + block.size - block.rest, 1, column_stride, block.rest, columns, to + block.words * to_stride,
                to_stride);
}

// Copies kc words, from word k0 on, of panels [begin, end) of B, each to [kc][kPanel].
template <class T>
void copy_b(const Gemm& g, int64_t begin, int64_t end, int64_t k0, int64_t kc, Word* to) {
  const BlockOfK<T> block(g.k, k0, kc);
  const T* const from = static_cast<const T*>(g.b) + block.begin * g.b_k;
  const int64_t whole = g.b_j == 1 ? std::max(begin, std::min(end, g.n / kPanel)) : begin;
  for (int64_t k = 0; k < kc; ++k) {  // a row through all panels: rows may lie a page apart
    const T* const row = from + k * kStep<T> * g.b_k;
    Word* y = to + k * kPanel;
    for (int64_t j = begin * kPanel; j < whole * kPanel; j += kPanel, y += kc * kPanel) {
      store_vector(y, Words<T>::of_columns(row + j, g.b_k, k < block.words));
      store_vector(y + kLanes, Words<T>::of_columns(row + j + kLanes, g.b_k, k < block.words));
    }
  }
  for (int64_t p = whole; p < end; ++p) {
    const int64_t columns = std::min<int64_t>(kPanel, g.n - p * kPanel);
    const T* const panel = from + p * kPanel * g.b_j;
    Word* const y = to + (p - begin) * kc * kPanel;
    if (const int64_t width = width_of(columns); columns < width)
      for (int64_t k = 0; k < kc; ++k) std::fill(y + k * kPanel + columns, y + k * kPanel + width, 0.f);
    if (kIsWord<T> && g.b_j == 1) {
      for (int64_t k = 0; k < kc; ++k) copy_run(panel + k * g.b_k, columns, y + k * kPanel);
    } else if (g.b_k == 1) {
      copy_runs(panel, g.b_j, columns, block, y, kPanel);
    } else {
      copy_elements(panel, g.b_k, g.b_j, block.size, columns, y, kPanel);
    }
  }
}

// Copies rows [i, i + mr) of A's block to the form that multiply_tile reads: by columns, or by rows where these are runs
// in memory and the level leaves them so. By columns, what is copied beyond the tile is there, and not used.
template <class T>
void copy_a(const Gemm& g, int64_t i, int64_t mr, int64_t k0, int64_t kc, Word* to) {
  const BlockOfK<T> block(g.k, k0, kc);
  const T* const from = static_cast<const T*>(g.a) + i * g.a_i + block.begin * g.a_k;
  if (kByColumns && g.a_k == 1) {
    copy_runs(from, g.a_i, i + kColumnStride <= g.m ? kColumnStride : mr, block, to, kColumnStride);
  } else if (g.a_k == 1) {
    for (int64_t r = 0; r < mr; ++r) copy_run(from + r * g.a_i, block.words, to + r * kRowStride);
    for (int64_t r = 0; r < mr; ++r)
      copy_elements(from + r * g.a_i + block.size - block.rest, 1, 0, block.rest, 1, to + r * kRowStride + block.words,
                    0);
  } else if (g.a_i == 1 && i + kColumnStride <= g.m) {
    for (int64_t k = 0; k < kc; ++k)
      for (int64_t r = 0; r < kColumnStride; r += kLanes)
        store_vector(to + k * kColumnStride + r,
                     Words<T>::of_columns(from + k * kStep<T> * g.a_k + r, g.a_k, k < block.words));
  } else {
    copy_elements(from, g.a_k, g.a_i, block.size, mr, to, kColumnStride);
  }
}

// ---- memory that is needed soon ------------------------------------------------------------------------------------

// Lines of runs of memory, `stride` bytes apart, which are to be fetched: of as many runs as go together the first line,
// the second, and so on, and then of the next runs. Lines behind the last run are of no use, and do no harm.
struct Runs {
  const char* next;
  int64_t stride, lines;  // of a run
  int64_t line;           // of the run, that is next
  int64_t left;           // in kTileRows lines

  Runs() = default;  // without values, as a TileProduct
  template <class T>
  Runs(const T* from, int64_t stride, int64_t runs, int64_t numbers)
      : next(reinterpret_cast<const char*>(from)),
        stride(stride * static_cast<int64_t>(sizeof(T))),
        lines((numbers * static_cast<int64_t>(sizeof(T)) + 63) / 64),
        line(0),
        left((runs + kTileRows - 1) / kTileRows * lines) {}

  // One of `shares` of about the same size.
  Runs share(int64_t i, int64_t shares) const {
    Runs r = *this;
    const int64_t begin = left * i / shares, end = left * (i + 1) / shares;
    r.line = begin % lines;
    r.next += begin / lines * kTileRows * stride + r.line * 64;
    r.left = end - begin;
    return r;
  }

  Lines take() {
    const Lines taken{next, stride};
    next += 64;
    if (++line == lines) {
      next += kTileRows * stride - lines * 64;
      line = 0;
    }
    --left;
    return taken;
  }
};

// What copy_a and copy_b will read of the block of K that begins with word k0.
template <class T>
Runs runs_of_a(const Gemm& g, int64_t i, int64_t mr, int64_t k0, int64_t words) {
  const BlockOfK<T> block(g.k, k0, words);
  const T* const from = static_cast<const T*>(g.a) + i * g.a_i + block.begin * g.a_k;
  return g.a_k == 1 ? Runs(from, g.a_i, mr, block.size) : Runs(from, g.a_k, block.size, mr);
}
template <class T>
Runs runs_of_b(const Gemm& g, int64_t begin, int64_t end, int64_t k0) {
  const BlockOfK<T> block(g.k, k0, kBlock);
  const T* const from = static_cast<const T*>(g.b) + block.begin * g.b_k + begin * kPanel * g.b_j;
  const int64_t columns = std::min(end * kPanel, g.n) - begin * kPanel;
  return g.b_k == 1 ? Runs(from, g.b_j, columns, block.size) : Runs(from, g.b_k, block.size, columns);
}

// What is fetched while the tiles of a row are multiplied, line by line: hundreds of lines at once are more than a core
// can wait for, and would hold up those of the panel. On Zen 4, copies of an A that is in L3 took an eighth of a product
// with 128 columns, and hardly anything so. On Zen 3, with AVX2, products of over 4 MB gain, up to a tenth; others would
// lose a twentieth, as there are five times as many tiles. There one line in four steps, until a row has all of its own,
// is better than one in two and the lines of each tile with the tile: a gradient of 512 x 3072 with momentum takes 0.90
// to 0.95 of the time.
struct Fetches {
  Lines lines[kBlock / (kTileRows * kStepsOfLine)];
  int64_t size = 0;

  // What is needed first comes first.
  void add(const Runs& runs) { waiting_[runs_++] = runs; }

  // With a tile of `steps` steps: as much as they suffice for. With the last all of the rest, at once.
  void with_tile(int64_t steps, bool last) {
    size = 0;
    const int64_t most = steps / (kTileRows * kStepsOfLine);
    while (size < most && find()) lines[size++] = waiting_[first_].take();
    if (!last) return;
    while (find()) {
      const Lines at_once = waiting_[first_].take();
      for (int64_t l = 0; l < kTileRows; ++l) __builtin_prefetch(at_once.first + l * at_once.stride);
    }
    runs_ = first_ = 0;
  }

private:
  bool find() {
    while (first_ < runs_ && waiting_[first_].left == 0) ++first_;
    return first_ < runs_;
  }

  Runs waiting_[5];  // of C, the optimizer's two states, A and B
  int runs_ = 0, first_ = 0;
};

// Rows [begin, end) in tiles of equal height, as many as there are registers for.
struct Tiles {
  Tiles(int64_t begin, int64_t end)
      : count((end - begin + kTileRows - 1) / kTileRows),
        begin_(begin),
        least_((end - begin) / count),
        larger_((end - begin) % count) {}
  int64_t row(int64_t tile) const { return begin_ + tile * least_ + std::min(tile, larger_); }
  int64_t count;

private:
  int64_t begin_, least_, larger_;
};

// ---- what follows the product -------------------------------------------------------------------------------------

template <class F>
void each_row(const Gemm& g, int64_t i, int64_t j, int64_t mr, const F& f) {
  for (int64_t r = 0; r < mr; ++r) f(r * kPanel, (i + r) * g.c_i + j * g.c_j);
}

template <class T>
void store_tile(const Gemm& g, int64_t i, int64_t j, int64_t mr, int64_t nr, const float* tile, void* to_) {
  T* const to = static_cast<T*>(to_);
  if constexpr (kIsWord<T>)
    if (g.c_i == 1 && g.c_j != 1) return transpose(tile, kPanel, mr, nr, to + i + j * g.c_j, g.c_j);
  each_row(g, i, j, mr, [&](int64_t t, int64_t at) {
    if (g.c_j != 1)
      for (int64_t c = 0; c < nr; ++c) store(to + at + c * g.c_j, tile[t + c]);
    else if constexpr (kIsWord<T>)
      copy_run(tile + t, nr, to + at);
    else if (nr == kPanel)  // which the compiler then knows
      store_n(to + at, tile + t, kPanel);
    else
      store_n(to + at, tile + t, nr);
  });
}

template <class T>
void load_tile(const Gemm& g, int64_t i, int64_t j, int64_t mr, int64_t nr, const void* from_, float* tile) {
  const T* const from = static_cast<const T*>(from_);
  each_row(g, i, j, mr, [&](int64_t t, int64_t at) {
    if (g.c_j != 1)
      for (int64_t c = 0; c < nr; ++c) tile[t + c] = load(from[at + c * g.c_j]);
    else if constexpr (kIsWord<T>)
      copy_run(from + at, nr, tile + t);
    else
      load_n(tile + t, from + at, nr);
  });
}

// The update of parameters in rows [i, i + mr) from column j on, whose gradients are [mr][stride].
inline void update_rows(const Gemm& g, int64_t i, int64_t j, int64_t mr, int64_t columns, const float* gradients,
                        int64_t stride) {
  const bool in_one_run = columns == stride && columns == g.c_i;
  const int64_t runs = in_one_run ? 1 : mr, length = mr * columns / runs;
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t at = (i + r) * g.c_i + j;
    update<float>(*g.update, static_cast<float*>(g.c) + at, gradients + r * stride, g.state0 ? g.state0 + at : nullptr,
                  g.state1 ? g.state1 + at : nullptr, length);
  }
}

// Whether the memory of C can be that of tiles as wide as panels.
template <class T>
bool tiles_in_c(const Gemm& g) {
  return kIsWord<T> && g.k <= kBlock && g.c_j == 1 && (!g.update || is_plain(*g.update));
}

template <class T>
bool updates_in_place(const Gemm& g) {
  return tiles_in_c<T>(g) && is_full(g.n);
}

// A run of C from element `at` on, where the product is there already, or in z.
inline void finish_in_place(const Gemm& g, int64_t at, int64_t numbers) {
  const auto here = [at](const void* p) { return static_cast<const float*>(p) + at; };
  void* const outputs[] = {const_cast<float*>(here(g.c))};
  if (g.activation) {
    const void* const inputs[] = {here(g.z ? g.z : g.c)};
    g.activation(outputs, inputs, numbers, g.parameter);
  } else if (g.gradient) {
    const void* const inputs[] = {here(g.c), here(g.saved)};
    g.gradient(outputs, inputs, numbers, g.parameter);
  }
}

template <class T>
void add_bias(const Gemm& g, int64_t i, int64_t j, int64_t mr, int64_t nr, float* tile) {
  if (!g.bias) return;
  const T* const bias = static_cast<const T*>(g.bias);
  float column[kPanel] = {};
  if (!g.bias_of_row) load_n(column, bias + j, nr);
  for (int64_t r = 0; r < mr; ++r) {
    if (g.bias_of_row) std::fill_n(column, kPanel, load(bias[i + r]));
    for (int64_t c = 0; c < kPanel; c += kLanes)
      store_vector(tile + r * kPanel + c, load_vector(tile + r * kPanel + c) + load_vector(column + c));
  }
}

// What follows the bias.
template <class T>
void finish_tile(const Gemm& g, int64_t i, int64_t j, int64_t mr, int64_t nr, float* tile) {
  if (g.z) store_tile<T>(g, i, j, mr, nr, tile, g.z);
  const int64_t all = mr * kPanel;
  if (g.activation) {
    const void* const inputs[] = {tile};
    void* const outputs[] = {tile};
    g.activation(outputs, inputs, all, g.parameter);
  } else if (g.gradient) {
    alignas(64) float saved[kTileRows * kPanel];
    load_tile<T>(g, i, j, mr, nr, g.saved, saved);
    const void* const inputs[] = {tile, saved};
    void* const outputs[] = {tile};
    g.gradient(outputs, inputs, all, g.parameter);
  }
  store_tile<T>(g, i, j, mr, nr, tile, g.c);
}

}  // namespace torchbp::TORCHBP_LEVEL
