// The kernels of gemm.h for products with few rows or columns, for one SIMD level: layers with few examples or outputs. A
// weight that meets few examples is read once, and a copy of it to where tiles want it takes as long as the product.
#pragma once

#include "gemm_tiles.h"

namespace torchbp::TORCHBP_LEVEL {

// ---- few rows -----------------------------------------------------------------------------------------------------

// B is read in blocks of K of this length or, where its rows are short, of a longer one, so that they have as many
// panels: row by row, as a core fetches what follows in a row. Sums wait in L2 meanwhile, of which they have half as much
// as those of tiles, for the sake of B.
constexpr int64_t kShortBlock = 8, kLongestBlock = 64, kPanelsOfBlock = 32;

// Whether a copy of B is not repaid: the gradient of a layer's input with few examples, of its weight with few outputs.
// Of a B that is one block of K, and has short rows, tiles read panels where they lie, which is faster.
inline bool has_few_rows(const Gemm& g) {
  if (g.b_j != 1) return false;
  return g.update ? g.m <= kTileRows && g.k > kBlock : g.m <= kFewestRows && (g.k > kBlock || g.b_k > 2 * kBlock);
}

// Numbers from a column of a block of A to the next, once copied.
constexpr int kFactors = (kTileRows + 7) / 8 * 8;

// tiles [panels][mr][kPanel] (+)= A [kc][kFactors], transposed, times the panels of B [kc][b_k].
template <int mr>
void multiply_short(const float* a, const float* b, int64_t b_k, int64_t kc, bool first, float* tiles, int64_t panels) {
  for (int64_t p = 0; p < panels; ++p, b += kPanel, tiles += mr * kPanel) {
    Vector sum[mr][2];
#pragma GCC unroll 16
    for (int i = 0; i < mr; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[i][v] = first ? Vector{} : load_vector(tiles + i * kPanel + v * kLanes);
    const float *factors = a, *row = b;
    for (int64_t k = 0; k < kc; ++k, factors += kFactors, row += b_k) {
      const Vector x[2] = {load_vector(row), load_vector(row + kLanes)};
#pragma GCC unroll 16
      for (int i = 0; i < mr; ++i) {
        const Vector factor = broadcast(factors[i]);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sum[i][v] += factor * x[v];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < mr; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) store_vector(tiles + i * kPanel + v * kLanes, sum[i][v]);
  }
}

inline void multiply_few_rows(const Gemm& g, int64_t i_begin, int64_t i_end, int64_t begin, int64_t end,
                              Scratch& scratch) {
  constexpr auto multiply = []<int... rows>(std::integer_sequence<int, rows...>) {
    return std::array{multiply_short<rows + 1>...};
  }(std::make_integer_sequence<int, kTileRows>());
  const float *const a = static_cast<const float*>(g.a), *const b = static_cast<const float*>(g.b);
  const Tiles tiles(i_begin, i_end);
  const int64_t rows = i_end - i_begin;
  const int64_t together = std::clamp<int64_t>(kHeld / 2 / (rows * kPanel), 1, end - begin);
  const int64_t block = std::clamp(kShortBlock * kPanelsOfBlock / together, kShortBlock, kLongestBlock);
  float* const sums = scratch.at_least(static_cast<size_t>((rows + 1) * together * kPanel));
  float* const row_of_c = sums + rows * together * kPanel;
  for (int64_t p0 = begin; p0 < end; p0 += together) {
    const int64_t p1 = std::min(end, p0 + together), width = p1 - p0;
    const int64_t columns = std::min(g.n, p1 * kPanel) - p0 * kPanel, whole = columns / kPanel, rest = columns % kPanel;
    // f(i, mr, the tiles side by side) of each row of tiles.
    const auto each_row_of_tiles = [&](const auto& f) {
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t i = tiles.row(t);
        f(i, tiles.row(t + 1) - i, sums + (i - i_begin) * width * kPanel);
      }
    };
    for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += block) {
      const int64_t kc = std::min(block, g.k - k0);
      const float* const rows_of_b = b + k0 * g.b_k + p0 * kPanel;
      alignas(64) float last[kLongestBlock * kPanel], factors[kLongestBlock * kFactors];
      if (rest > 0)  // with zeros where the last panel has no columns
        for (int64_t k = 0; k < kc; ++k) {
          float* const row = last + k * kPanel;
          std::fill(std::copy_n(rows_of_b + k * g.b_k + whole * kPanel, rest, row), row + kPanel, 0.f);
        }
      each_row_of_tiles([&](int64_t i, int64_t mr, float* row_of_tiles) {
        copy_elements(a + i * g.a_i + k0 * g.a_k, g.a_k, g.a_i, kc, mr, factors, kFactors);
        const auto add = multiply[static_cast<size_t>(mr - 1)];
        add(factors, rows_of_b, g.b_k, kc, k0 == 0, row_of_tiles, whole);
        if (rest > 0) add(factors, last, kPanel, kc, k0 == 0, row_of_tiles + whole * mr * kPanel, 1);
      });
    }
    each_row_of_tiles([&](int64_t i, int64_t mr, float* row_of_tiles) {
      if (!g.update) {
        for (int64_t p = p0; p < p1; ++p, row_of_tiles += mr * kPanel) {
          const int64_t nr = std::min<int64_t>(kPanel, g.n - p * kPanel);
          add_bias<float>(g, i, p * kPanel, mr, nr, row_of_tiles);
          finish_tile<float>(g, i, p * kPanel, mr, nr, row_of_tiles);
        }
        return;
      }
      for (int64_t r = 0; r < mr; ++r) {
        for (int64_t p = 0; p < width; ++p)
          copy_run(row_of_tiles + (p * mr + r) * kPanel, kPanel, row_of_c + p * kPanel);
        update_rows(g, i + r, p0 * kPanel, 1, columns, row_of_c, width * kPanel);
      }
    });
  }
}

// ---- few columns --------------------------------------------------------------------------------------------------

// How many are few; and where rows of A are short enough for tiles to read them where they lie.
constexpr int64_t kEnoughColumns = std::min(16, kPanel), kFewestColumns = 4;

// How many are multiplied at a time, with as many rows as there are registers for sums.
constexpr int kDotColumns = kManyRegisters ? 8 : 4, kDots = kManyRegisters ? 24 : 12;
template <int columns>
constexpr int kDotRows = std::min(kTileRows, kDots / columns);

// Numbers of these columns that stay in L1 while rows of A pass, and how many of these stay in L2 for the next columns.
constexpr int64_t kNearColumns = 4096, kPassing = 64 / kTileRows * kTileRows;

// Whether C is products of rows, runs along k, with few columns: the output of a layer with few examples or outputs.
inline bool has_few_columns(const Gemm& g) {
  if (g.a_k != 1 || g.update) return false;
  return (g.b_k == 1 && g.n <= kFewestColumns) ||
         ((g.b_k == 1 || g.b_j == 1) && g.n <= std::min(kEnoughColumns, g.m) && g.k > kBlock);
}

// The last numbers of a run, fewer than a vector has, and zeros.
TORCHBP_INLINE Vector load_last(const float* run, int64_t length, int64_t numbers) {
  if (length >= kLanes) {
    typedef int Integers __attribute__((vector_size(4 * kLanes)));
    Integers lane;
    for (int l = 0; l < kLanes; ++l) lane[l] = l;
    return (Vector)((lane >= static_cast<int>(kLanes - numbers)) & (Integers)load_vector(run + length - kLanes));
  }
  float few[kLanes] = {};
  std::copy_n(run, numbers, few);
  return load_vector(few);
}

// tile [mr][kPanel] (+)= the sums over kc numbers of rows of A with columns of B, each a run of k: in lanes whose sums
// are added in the end.
template <int columns>
void multiply_dots(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t mr, int64_t kc,
                   bool first, float* tile) {
  constexpr int rows = kDotRows<columns>, groups = (rows * columns + kLanes - 1) / kLanes;
  const float* row[rows];  // in the place of rows that are not there, the last
  for (int r = 0; r < rows; ++r) row[r] = a + std::min<int64_t>(r, mr - 1) * a_stride;
  Vector sum[groups][kLanes] = {};
  const auto step = [&](const auto& load_at) __attribute__((always_inline)) {
    // The fewer ones are held, the others follow one by one.
    constexpr bool holds_rows = rows <= columns;
    constexpr int held = std::min(rows, columns), others = std::max(rows, columns);
    Vector x[held];
#pragma GCC unroll 16
    for (int h = 0; h < held; ++h) x[h] = load_at(holds_rows ? row[h] : b + h * b_stride);
#pragma GCC unroll 16
    for (int o = 0; o < others; ++o) {
      const Vector y = load_at(holds_rows ? b + o * b_stride : row[o]);
#pragma GCC unroll 16
      for (int h = 0; h < held; ++h) {
        const int s = holds_rows ? h * columns + o : o * columns + h;
        sum[s / kLanes][s % kLanes] += x[h] * y;
      }
    }
  };
  const int64_t whole = kc / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) step([k](const float* p) { return load_vector(p + k); });
  if (whole < kc) step([&](const float* p) { return load_last(p, kc, kc - whole); });
  float sums[groups * kLanes];
  for (int i = 0; i < groups; ++i) store_vector(sums + i * kLanes, sum_lanes(sum[i]));
  for (int64_t r = 0; r < mr; ++r)
    for (int c = 0; c < columns; ++c) {
      float& to = tile[r * kPanel + c];
      to = sums[r * columns + c] + (first ? 0 : to);
    }
}

// tiles [i_end - i_begin][kPanel] = rows of A with `columns` of B.
template <int columns>
void multiply_columns(const Gemm& g, int64_t i_begin, int64_t i_end, const float* b, int64_t b_stride, float* tiles) {
  constexpr int64_t rows = kDotRows<columns>, block = kNearColumns / columns / kLanes * kLanes;
  const float* const a = static_cast<const float*>(g.a);
  for (int64_t k = 0; k == 0 || k < g.k; k += block)
    for (int64_t i = i_begin; i < i_end; i += rows)
      multiply_dots<columns>(a + i * g.a_i + k, g.a_i, b + k, b_stride, std::min(rows, i_end - i),
                             std::min(block, g.k - k), k == 0, tiles + (i - i_begin) * kPanel);
}

inline void multiply_few_columns(const Gemm& g, int64_t i_begin, int64_t i_end, Scratch& scratch) {
  constexpr auto multiply = []<int... columns>(std::integer_sequence<int, columns...>) {
    return std::array{multiply_columns<columns + 1>...};
  }(std::make_integer_sequence<int, kDotColumns>());
  const float* b = static_cast<const float*>(g.b);
  int64_t b_stride = g.b_j;
  if (g.b_k != 1 || g.n > 2) {  // columns that lie KiB apart share L1 sets
    b_stride = (g.k + 1023) / 1024 * 1024 + 16;
    float* const copy = scratch.at_least(static_cast<size_t>(g.n * b_stride));
    if (g.b_k == 1)
      for (int64_t c = 0; c < g.n; ++c) copy_run(b + c * g.b_j, g.k, copy + c * b_stride);
    else
      transpose(b, g.b_k, g.k, g.n, copy, b_stride);
    b = copy;
  }
  const int64_t parts = (g.n + kDotColumns - 1) / kDotColumns;
  alignas(64) float tiles[kPassing * kPanel] = {};
  // Functions want runs, of which columns may be some: in a tile they would be computed for columns that are not there.
  const bool in_columns = g.c_i == 1 && (g.activation || g.gradient);
  for (int64_t i0 = i_begin; i0 < i_end; i0 += kPassing) {
    const int64_t i1 = std::min(i_end, i0 + kPassing);
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t j = g.n * p / parts, columns = g.n * (p + 1) / parts - j;
      multiply[static_cast<size_t>(columns - 1)](g, i0, i1, b + j * b_stride, b_stride, tiles + j);
    }
    for (int64_t i = i0; i < i1; i += kTileRows) {
      const int64_t mr = std::min<int64_t>(kTileRows, i1 - i);
      float* const tile = tiles + (i - i0) * kPanel;
      add_bias<float>(g, i, 0, mr, g.n, tile);
      if (in_columns)
        store_tile<float>(g, i, 0, mr, g.n, tile, g.z ? g.z : g.c);
      else
        finish_tile<float>(g, i, 0, mr, g.n, tile);
    }
    if (in_columns)
      for (int64_t c = 0; c < g.n; ++c) finish_in_place(g, i0 + c * g.c_j, i1 - i0);
  }
}

}  // namespace torchbp::TORCHBP_LEVEL
