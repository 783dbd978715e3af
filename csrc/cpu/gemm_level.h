// The kernels of gemm.h for one SIMD level.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "update.h"

namespace torchbp::TORCHBP_LEVEL {

// A vector register of the level, and one that may stand anywhere in memory.
typedef float Vector __attribute__((vector_size(TORCHBP_VECTOR)));
typedef float Unaligned __attribute__((vector_size(TORCHBP_VECTOR), aligned(4), may_alias));
constexpr int kLanes = TORCHBP_VECTOR / 4;

// Accumulators of 14 x 2 of 32 registers, or 6 x 2 of 16: the rest hold the panel's row and a broadcast.
constexpr int kTileRows = TORCHBP_VECTOR == 64 ? 14 : 6;
constexpr int kPanel = 2 * kLanes;
constexpr int64_t kBlock = 256;              // of K: a tile of A fits L1 beside the panel that streams by
constexpr int64_t kRowStride = kBlock + 16;  // of A's rows once copied: not a power of two, which would share L1 sets
constexpr int64_t kColumnStride = kTileRows > 8 ? 16 : 8;  // of A's columns once copied
constexpr int64_t kCopy = std::max(kTileRows * kRowStride, kBlock* kColumnStride);
constexpr int64_t kPanelBytes = 256 * 1024;  // of B that is to stay in L2 while tiles of A pass
constexpr int64_t kHeld = 72 * 1024;         // numbers of unfinished C that are to stay in L2

TORCHBP_INLINE Vector load_vector(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
TORCHBP_INLINE void store_vector(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

// x in every lane: one load. Vector{} + x would add, as 0 + -0 is not -0.
template <size_t... l>
TORCHBP_INLINE Vector broadcast(const float& x, std::index_sequence<l...>) {
  return Vector{(static_cast<void>(l), x)...};
}
TORCHBP_INLINE Vector broadcast(const float& x) { return broadcast(x, std::make_index_sequence<kLanes>()); }

// tile [mr][kPanel] (+)= A B over kc steps. A is [mr][kRowStride] (by_rows) or [kc][kColumnStride].
template <int mr, int vectors, bool by_rows>
void multiply_tile(int64_t kc, const float* a, const float* b, int64_t b_stride, float* tile, bool first) {
  Vector sum[mr][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < mr; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sum[i][v] = first ? Vector{} : load_vector(tile + i * kPanel + v * kLanes);
  for (int64_t k = 0; k < kc; ++k) {
    Vector row[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) row[v] = load_vector(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < mr; ++i) {
      const Vector factor = broadcast(by_rows ? a[i * kRowStride] : a[i]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[i][v] += factor * row[v];
    }
    a += by_rows ? 1 : kColumnStride;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < mr; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store_vector(tile + i * kPanel + v * kLanes, sum[i][v]);
}

using MultiplyTile = void (*)(int64_t, const float*, const float*, int64_t, float*, bool);

template <int vectors, bool by_rows, int... rows>
constexpr std::array<MultiplyTile, sizeof...(rows)> tiles_of(std::integer_sequence<int, rows...>) {
  return {multiply_tile<rows + 1, vectors, by_rows>...};
}

template <int vectors, bool by_rows>
constexpr auto kMultiply = tiles_of<vectors, by_rows>(std::make_integer_sequence<int, kTileRows>());

inline MultiplyTile multiply_for(int64_t rows, int64_t columns, bool by_rows) {
  if (columns <= kLanes) return by_rows ? kMultiply<1, true>[rows - 1] : kMultiply<1, false>[rows - 1];
  return by_rows ? kMultiply<2, true>[rows - 1] : kMultiply<2, false>[rows - 1];
}

// ---- transposition ------------------------------------------------------------------------------------------------

// Lanes of (a, b) in which bit d of the lane's number picks: b's lower half beside a's, or the upper ones.
template <int d, size_t... l>
TORCHBP_INLINE Vector lower(Vector a, Vector b, std::index_sequence<l...>) {
  return __builtin_shufflevector(a, b, ((l & d) ? kLanes + l - d : l)...);
}
template <int d, size_t... l>
TORCHBP_INLINE Vector upper(Vector a, Vector b, std::index_sequence<l...>) {
  return __builtin_shufflevector(a, b, ((l & d) ? kLanes + l : l + d)...);
}

template <int d>
TORCHBP_INLINE void transpose_stage(Vector (&row)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & d) continue;
    const Vector a = row[i], b = row[i + d];
    row[i] = lower<d>(a, b, std::make_index_sequence<kLanes>());
    row[i + d] = upper<d>(a, b, std::make_index_sequence<kLanes>());
  }
}

// to [k][to_stride] = transpose of from [rows][from_stride]: a square of kLanes.
TORCHBP_INLINE void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vector row[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) row[i] = load_vector(from + i * from_stride);
  transpose_stage<1>(row);
  transpose_stage<2>(row);
  if constexpr (kLanes > 4) transpose_stage<4>(row);
  if constexpr (kLanes > 8) transpose_stage<8>(row);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store_vector(to + i * to_stride, row[i]);
}

// to [columns][to_stride] = transpose of from [rows][from_stride].
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  for (int64_t r = 0; r < whole_rows; r += kLanes)
    for (int64_t c = 0; c < whole_columns; c += kLanes)
      transpose_square(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to[c * to_stride + r] = from[r * from_stride + c];
}

// ---- copies of blocks ------------------------------------------------------------------------------------------------------

inline bool reads_b_in_place(const Gemm& g) { return g.b_j == 1 && g.n % kLanes == 0 && g.b_k <= 2 * kBlock; }

// Copies rows [k0, k0 + kc) of panels [begin, end) of B, each to [kc][kPanel].
inline void copy_b(const Gemm& g, int64_t begin, int64_t end, int64_t k0, int64_t kc, float* to) {
  const float* const from = g.b + k0 * g.b_k;
  const int64_t whole = g.b_j == 1 ? std::max(begin, std::min(end, g.n / kPanel)) : begin;
  for (int64_t k = 0; k < kc; ++k) {  // a row through all panels: rows may lie a page apart
    const float* const row = from + k * g.b_k;
    float* y = to + k * kPanel;
    for (int64_t j = begin * kPanel; j < whole * kPanel; j += kPanel, y += kc * kPanel) {
      store_vector(y, load_vector(row + j));
      store_vector(y + kLanes, load_vector(row + j + kLanes));
    }
  }
  for (int64_t p = whole; p < end; ++p) {
    const int64_t columns = std::min<int64_t>(kPanel, g.n - p * kPanel);
    const float* const panel = from + p * kPanel * g.b_j;
    float* const y = to + (p - begin) * kc * kPanel;
    if (columns < kPanel) std::fill_n(y, kc * kPanel, 0.f);
    if (g.b_k == 1) {
      transpose(panel, g.b_j, columns, kc, y, kPanel);
    } else {
      for (int64_t k = 0; k < kc; ++k)
        for (int64_t c = 0; c < columns; ++c) y[k * kPanel + c] = panel[k * g.b_k + c * g.b_j];
    }
  }
}

// Copies rows [i, i + mr) of A's block to one of the two forms that multiply_tile reads. Returns whether by rows.
inline bool copy_a(const Gemm& g, int64_t i, int64_t mr, int64_t k0, int64_t kc, float* to) {
  const float* const from = g.a + i * g.a_i + k0 * g.a_k;
  if (g.a_k == 1) {
    const int64_t whole = kc / kLanes * kLanes;
    for (int64_t r = 0; r < mr; ++r) {
      const float* const row = from + r * g.a_i;
      for (int64_t k = 0; k < whole; k += kLanes) store_vector(to + r * kRowStride + k, load_vector(row + k));
      for (int64_t k = whole; k < kc; ++k) to[r * kRowStride + k] = row[k];
    }
    return true;
  }
  if (g.a_i == 1 && i + kColumnStride <= g.m) {  // what is read beyond the tile is there, and not used
    for (int64_t k = 0; k < kc; ++k)
      for (int64_t r = 0; r < kColumnStride; r += kLanes)
        store_vector(to + k * kColumnStride + r, load_vector(from + k * g.a_k + r));
  } else {
    for (int64_t k = 0; k < kc; ++k)
      for (int64_t r = 0; r < mr; ++r) to[k * kColumnStride + r] = from[r * g.a_i + k * g.a_k];
  }
  return false;
}

// Fetches part `part` of `parts` of a block of A that copy_a will read next, while a panel is being multiplied.
inline void prefetch_a(const Gemm& g, int64_t i, int64_t mr, int64_t k0, int64_t kc, int64_t part, int64_t parts) {
  constexpr int64_t line = 16;
  const bool by_rows = g.a_k == 1;
  const int64_t runs = by_rows ? mr : kc, lines = by_rows ? (kc + line - 1) / line : 1, total = runs * lines;
  const float* const from = g.a + i * g.a_i + k0 * g.a_k;
  for (int64_t l = total * part / parts; l < total * (part + 1) / parts; ++l)
    __builtin_prefetch(from + (by_rows ? l / lines * g.a_i + l % lines * line : l * g.a_k));
}

// ---- what follows the product -------------------------------------------------------------------------------------

template <class F>
void each_row(const Gemm& g, int64_t i, int64_t j, int64_t mr, const F& f) {
  for (int64_t r = 0; r < mr; ++r) f(r * kPanel, (i + r) * g.c_i + j * g.c_j);
}

// Fetches what an update of the tile will read.
inline void prefetch_update(const Gemm& g, int64_t i, int64_t j, int64_t mr) {
  constexpr int64_t line = 16;
  each_row(g, i, j, mr, [&](int64_t, int64_t at) {
    for (const float* const p : {g.c, g.state0, g.state1})
      for (int64_t c = 0; p && c < kPanel; c += line) __builtin_prefetch(p + at + c, 1);
  });
}

inline void store_tile(const Gemm& g, int64_t i, int64_t j, int64_t mr, int64_t nr, const float* tile, float* to) {
  each_row(g, i, j, mr, [&](int64_t t, int64_t at) {
    if (g.c_j == 1 && nr == kPanel) {
      store_vector(to + at, load_vector(tile + t));
      store_vector(to + at + kLanes, load_vector(tile + t + kLanes));
    } else if (g.c_j == 1 && nr == kLanes) {
      store_vector(to + at, load_vector(tile + t));
    } else {
      for (int64_t c = 0; c < nr; ++c) to[at + c * g.c_j] = tile[t + c];
    }
  });
}

inline void load_tile(const Gemm& g, int64_t i, int64_t j, int64_t mr, int64_t nr, const float* from, float* tile) {
  each_row(g, i, j, mr, [&](int64_t t, int64_t at) {
    if (g.c_j == 1 && nr == kPanel) {
      store_vector(tile + t, load_vector(from + at));
      store_vector(tile + t + kLanes, load_vector(from + at + kLanes));
    } else {
      std::fill_n(tile + t, kPanel, 0.f);
      for (int64_t c = 0; c < nr; ++c) tile[t + c] = from[at + c * g.c_j];
    }
  });
}

inline void finish_tile(const Gemm& g, int64_t i, int64_t j, int64_t mr, int64_t nr, float* tile) {
  if (g.update) {
    each_row(g, i, j, mr, [&](int64_t t, int64_t at) {
      update<float>(*g.update, g.c + at, tile + t, g.state0 ? g.state0 + at : nullptr,
                    g.state1 ? g.state1 + at : nullptr, nr);
    });
    return;
  }
  if (g.bias) {
    float column[kPanel] = {};
    if (!g.bias_of_row) std::copy_n(g.bias + j, nr, column);
    for (int64_t r = 0; r < mr; ++r) {
      const float row = g.bias_of_row ? g.bias[i + r] : 0.f;
      for (int64_t c = 0; c < kPanel; c += kLanes)
        store_vector(tile + r * kPanel + c,
                     load_vector(tile + r * kPanel + c) + (broadcast(row) + load_vector(column + c)));
    }
  }
  if (g.z) store_tile(g, i, j, mr, nr, tile, g.z);
  const int64_t all = mr * kPanel;
  if (g.activation) {
    const void* const inputs[] = {tile};
    void* const outputs[] = {tile};
    g.activation(outputs, inputs, all, g.parameter);
  } else if (g.gradient) {
    alignas(64) float saved[kTileRows * kPanel];
    load_tile(g, i, j, mr, nr, g.saved, saved);
    const void* const inputs[] = {tile, saved};
    void* const outputs[] = {tile};
    g.gradient(outputs, inputs, all, g.parameter);
  }
  store_tile(g, i, j, mr, nr, tile, g.c);
}

// ---- the product --------------------------------------------------------------------------------------------------

inline void gemm_run(const Gemm& g, int64_t i_begin, int64_t i_end, int64_t begin, int64_t end, Scratch& scratch) {
  if (i_begin >= i_end || begin >= end) return;
  const bool in_place = reads_b_in_place(g), one_block = g.k <= kBlock;
  const int64_t deepest = std::min(kBlock, std::max<int64_t>(g.k, 1));
  const int64_t together = std::min(end - begin, std::max<int64_t>(1, kPanelBytes / (deepest * kPanel * 4)));
  // Rows in tiles of equal height, as many as there are registers for.
  const int64_t tiles = (i_end - i_begin + kTileRows - 1) / kTileRows;
  const auto row_of = [&](int64_t tile) { return i_begin + (i_end - i_begin) * tile / tiles; };
  constexpr int64_t tile_size = kTileRows * kPanel;
  const int64_t held = one_block ? tiles : std::min(tiles, std::max<int64_t>(1, kHeld / (together * tile_size)));
  const int64_t copied = in_place ? 0 : together * deepest * kPanel;
  float* const copy = scratch.at_least(kCopy + copied + (one_block ? 1 : held * together) * tile_size);
  float* const panels = copy + kCopy;
  float* const unfinished = panels + copied;
  for (int64_t p0 = begin; p0 < end; p0 += together) {
    const int64_t p1 = std::min(end, p0 + together), width = p1 - p0;
    for (int64_t t0 = 0; t0 < tiles; t0 += held) {
      const int64_t t1 = std::min(tiles, t0 + held);
      for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += kBlock) {
        const int64_t kc = std::min(kBlock, g.k - k0);
        const bool last = k0 + kBlock >= g.k;
        if (!in_place) copy_b(g, p0, p1, k0, kc, panels);
        for (int64_t t = t0; t < t1; ++t) {
          const int64_t i = row_of(t), mr = row_of(t + 1) - i;
          const bool by_rows = copy_a(g, i, mr, k0, kc, copy);
          const bool turn = t + 1 == t1;  // to the next block of K
          const int64_t next_i = row_of(turn ? t0 : t + 1), next_k = turn ? k0 + kBlock : k0;
          for (int64_t p = p0; p < p1; ++p) {
            const int64_t column = p * kPanel, nr = std::min<int64_t>(kPanel, g.n - column);
            float* const tile = one_block ? unfinished : unfinished + ((t - t0) * width + p - p0) * tile_size;
            if (g.update) prefetch_update(g, i, column, mr);
            if (next_k < g.k) prefetch_a(g, next_i, mr, next_k, std::min(kBlock, g.k - next_k), p - p0, width);
            const MultiplyTile multiply = multiply_for(mr, nr, by_rows);
            if (in_place)
              multiply(kc, copy, g.b + k0 * g.b_k + column, g.b_k, tile, k0 == 0);
            else
              multiply(kc, copy, panels + (p - p0) * kc * kPanel, kPanel, tile, k0 == 0);
            if (last) finish_tile(g, i, column, mr, nr, tile);
          }
        }
      }
    }
  }
}

// ---- sums over the examples ----------------------------------------------------------------------------------------

// The sum of a vector's lanes, halves upon halves.
template <int width, size_t... l>
TORCHBP_INLINE Vector fold(Vector v, std::index_sequence<l...>) {
  return v + __builtin_shufflevector(v, v, ((l + width) % kLanes)...);
}
TORCHBP_INLINE float sum_lanes(Vector v) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  if constexpr (kLanes > 8) v = fold<8>(v, lanes);
  if constexpr (kLanes > 4) v = fold<4>(v, lanes);
  v = fold<2>(v, lanes);
  return fold<1>(v, lanes)[0];
}

// db [out] = sum over i of dz(i, o), in float32 over blocks of rows and float64 over these.
inline void sum_rows(const float* dz, int64_t row, int64_t column, int64_t n, int64_t out, float* db) {
  constexpr int64_t block = 512, chunk = 64;
  if (row == 1) {
    for (int64_t o = 0; o < out; ++o) {
      const float* const x = dz + o * column;
      double sum = 0;
      for (int64_t begin = 0; begin < n; begin += block) {
        const int64_t end = std::min(n, begin + block);
        Vector part{};
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) part += load_vector(x + i);
        float rest = 0;
        for (; i < end; ++i) rest += x[i];
        sum += rest + sum_lanes(part);
      }
      db[o] = static_cast<float>(sum);
    }
    return;
  }
  for (int64_t o = 0; o < out; o += chunk) {
    const int64_t width = std::min(chunk, out - o);
    double sum[chunk] = {};
    for (int64_t begin = 0; begin < n; begin += block) {
      float part[chunk] = {};
      for (int64_t i = begin; i < std::min(n, begin + block); ++i) {
        const float* const x = dz + i * row + o * column;
        if (column == 1)
          for (int64_t c = 0; c < width; ++c) part[c] += x[c];
        else
          for (int64_t c = 0; c < width; ++c) part[c] += x[c * column];
      }
      for (int64_t c = 0; c < width; ++c) sum[c] += part[c];
    }
    for (int64_t c = 0; c < width; ++c) db[o + c] = static_cast<float>(sum[c]);
  }
}

inline void fill_gemm(GemmKernels& kernels) { kernels = {kTileRows, kPanel, gemm_run}; }

}  // namespace torchbp::TORCHBP_LEVEL
