// The kernels of gemm.h for one SIMD level.
#pragma once

#include "gemm_few.h"

namespace torchbp::TORCHBP_LEVEL {

// ---- the product --------------------------------------------------------------------------------------------------

// In a function of its own where nothing is fetched: small products want the registers.
template <class T, bool fetching>
void multiply_blocks(const Gemm& g, int64_t i_begin, int64_t i_end, int64_t begin, int64_t end, Scratch& scratch) {
  const int64_t all = words<T>(g.k);
  const bool a_in_place = reads_a_in_place<T>(g, end - begin);
  const bool b_in_place = reads_b_in_place<T>(g, i_end - i_begin), one_block = all <= kBlock;
  const bool by_rows = g.a_k == 1 && (a_in_place ? g.a_i != 1 : !kByColumns);
  const Lie lie = by_rows ? Lie::rows : a_in_place || b_in_place ? Lie::columns : Lie::copies;
  const int64_t deepest = std::min(kBlock, std::max<int64_t>(all, 1));
  const bool in_c = tiles_in_c<T>(g), has_function = g.activation || g.gradient;
  // Tiles of gradients side by side make up rows, which are updated when they are complete. Tile by tile an update would
  // read a line or two of each row: a page and, where rows are 4 KiB apart, the same L1 set for all. A tenth of the time
  // of a gradient of 512 x 3072 with momentum.
  const bool in_rows = g.update && !updates_in_place<T>(g);
  constexpr int64_t tile_size = kTileRows * kPanel;
  const int64_t fit = kPanelBytes / (deepest * kPanel * 4);
  const int64_t together =
      std::min(end - begin, std::max<int64_t>(1, in_rows ? std::min(fit, kUpdateRun / kPanel) : fit));
  const PlainSgd plain(g.update ? *g.update : Update());
  const Tiles rows(i_begin, i_end);
  const int64_t tiles = rows.count;
  const int64_t held = one_block ? tiles : std::min(tiles, std::max<int64_t>(1, kHeld / (together * tile_size)));
  const int64_t copied = b_in_place ? 0 : together * deepest * kPanel;
  const int64_t apart = in_rows ? kPanel : one_block ? 0 : tile_size;  // from a tile to the next one's place
  const int64_t rows_of_tiles = one_block ? 1 : held;
  float* const copy = scratch.at_least(kCopy + copied + rows_of_tiles * (apart ? together : 1) * tile_size);
  float* const panels = copy + kCopy;
  float* const unfinished = panels + copied;
  [[maybe_unused]] Fetches fetches;
  for (int64_t p0 = begin; p0 < end; p0 += together) {
    const int64_t p1 = std::min(end, p0 + together), width = p1 - p0;
    // Functions want rows that are one run.
    const int64_t columns = std::min(g.n, p1 * kPanel) - p0 * kPanel;
    const bool in_one_run = in_c && has_function && g.c_i == columns && columns <= kLongRun && is_full(columns);
    const bool lies_in_c = has_function ? in_one_run : in_c && !in_rows;
    for (int64_t t0 = 0; t0 < tiles; t0 += held) {
      const int64_t t1 = std::min(tiles, t0 + held);
      for (int64_t k0 = 0; k0 == 0 || k0 < all; k0 += kBlock) {
        const int64_t kc = std::min(kBlock, all - k0);
        const bool last = k0 + kBlock >= all;
        if (!b_in_place) copy_b<T>(g, p0, p1, k0, kc, panels);
        for (int64_t t = t0; t < t1; ++t) {
          const int64_t i = rows.row(t), mr = rows.row(t + 1) - i;
          if (!a_in_place) copy_a<T>(g, i, mr, k0, kc, copy);
          if constexpr (fetching) {
            // After this row comes one of the same block of K, the next block, or the first one: of further rows, or panels.
            const bool turn = t + 1 == t1, is_complete = last && t1 == tiles;
            const int64_t next_p0 = is_complete ? p1 : p0, next_p1 = std::min(end, next_p0 + together);
            const int64_t next_t = !turn ? t + 1 : !last ? t0 : is_complete ? 0 : t1, next_k = last ? 0 : k0 + kBlock;
            const bool ends = next_p0 == end;
            // Lines of A's columns hold more than a tile of few rows, so that the last copy has read them too.
            const bool is_near = !kManyRegisters && g.a_i == 1;
            if (g.update && last)
              for (const float* const p : {static_cast<float*>(g.c), g.state0, g.state1})
                if (p) fetches.add(Runs(p + i * g.c_i + p0 * kPanel, g.c_i, mr, columns));
            if (!is_near && !(turn && ends))
              fetches.add(runs_of_a<T>(g, rows.row(next_t), mr, turn ? next_k : k0, kBlock));
            if (!b_in_place && !ends) fetches.add(runs_of_b<T>(g, next_p0, next_p1, next_k).share(t - t0, t1 - t0));
          }
          float* const row_of_tiles = unfinished + (one_block ? 0 : t - t0) * width * tile_size;
          float* const row_of_c = lies_in_c ? static_cast<float*>(g.z ? g.z : g.c) + i * g.c_i : nullptr;
          TileProduct product;
          product.kc = kc, product.first = k0 == 0, product.fetch = fetches.lines;
          product.a = a_in_place ? static_cast<const Word*>(g.a) + i * g.a_i + k0 * g.a_k : copy;
          product.a_stride = a_in_place ? (by_rows ? g.a_i : g.a_k) : by_rows ? kRowStride : kColumnStride;
          product.b_stride = b_in_place ? g.b_k : kPanel;
          product.bias_of_rows = last && g.bias && g.bias_of_row ? static_cast<const T*>(g.bias) + i : nullptr;
          const MultiplyTile multiply_whole = multiply_for<T>(mr, lie);
          for (int64_t p = p0; p < p1; ++p) {
            const int64_t column = p * kPanel, nr = std::min<int64_t>(kPanel, g.n - column);
            const bool direct = lies_in_c && is_full(nr);
            float* const tile = row_of_tiles + (p - p0) * apart;
            MultiplyTile multiply = nr == kPanel ? multiply_whole : multiply_for<T>(mr, lie, nr);
            if constexpr (fetching) {
              fetches.with_tile(nr == kPanel ? kc : 0, p + 1 == p1);
              product.fetches = fetches.size;
              if (fetches.size > 0) multiply = multiply_for<T, true>(mr, lie);
            }
            product.b =
                b_in_place ? static_cast<const Word*>(g.b) + k0 * g.b_k + column : panels + (p - p0) * kc * kPanel;
            product.to = direct ? row_of_c + column : tile;
            product.to_stride = direct ? g.c_i : in_rows ? width * kPanel : kPanel;
            product.update = direct && g.update ? &plain : nullptr;
            product.bias_of_columns =
                direct && g.bias && !g.bias_of_row ? static_cast<const float*>(g.bias) + column : nullptr;
            multiply(product);
            if (last && !direct && !in_rows) {
              if (!g.bias_of_row) add_bias<T>(g, i, column, mr, nr, tile);
              finish_tile<T>(g, i, column, mr, nr, tile);
            }
          }
          if (last && in_rows) update_rows(g, i, p0 * kPanel, mr, columns, row_of_tiles, width * kPanel);
          if (in_one_run) finish_in_place(g, i * g.c_i, mr * g.c_i);
        }
      }
    }
  }
}

template <class T>
void gemm_run(const Gemm& g, int64_t i_begin, int64_t i_end, int64_t begin, int64_t end, Scratch& scratch) {
  if (i_begin >= i_end || begin >= end) return;
  if constexpr (kIsWord<T>) {
    if (has_few_columns(g)) return multiply_few_columns(g, i_begin, i_end, scratch);
    if (has_few_rows(g)) return multiply_few_rows(g, i_begin, i_end, begin, end, scratch);
  }
  const bool in_cache = g.m * g.k + g.k * g.n + g.m * g.n < kCached;
  (in_cache ? multiply_blocks<T, false> : multiply_blocks<T, true>)(g, i_begin, i_end, begin, end, scratch);
}

// ---- sums over the examples ----------------------------------------------------------------------------------------

TORCHBP_INLINE Vector load_numbers(const float* p) { return load_vector(p); }
template <class T>
TORCHBP_INLINE Vector load_numbers(const T* p) {
  float numbers[kLanes];
  load_n(numbers, p, kLanes);
  return load_vector(numbers);
}

// db [out] = sum over i of dz(i, o), in float32 over blocks of rows and float64 over these.
template <class T>
void sum_rows(const void* dz_, int64_t row, int64_t column, int64_t n, int64_t out, void* db_) {
  const T* const dz = static_cast<const T*>(dz_);
  T* const db = static_cast<T*>(db_);
  constexpr int64_t lane_block = 512, block = 64, chunk = 64;  // the first is added up by all lanes of a vector
  if (row == 1) {
    for (int64_t first = 0; first < out; first += kLanes) {
      const int64_t rows = std::min<int64_t>(kLanes, out - first);
      const T* x[kLanes];  // in the place of rows that are not there, the last
      for (int o = 0; o < kLanes; ++o) x[o] = dz + std::min(first + o, out - 1) * column;
      double sum[kLanes] = {};
      for (int64_t begin = 0; begin < n; begin += lane_block) {
        const int64_t end = std::min(n, begin + lane_block), whole = begin + (end - begin) / kLanes * kLanes;
        Vector part[kLanes] = {};
        for (int64_t i = begin; i < whole; i += kLanes)
#pragma GCC unroll 16
          for (int o = 0; o < kLanes; ++o) part[o] += load_numbers(x[o] + i);
        float numbers[kLanes];
        store_vector(numbers, sum_lanes(part));
        for (int64_t i = whole; i < end; ++i)
          for (int o = 0; o < kLanes; ++o) numbers[o] += load(x[o][i]);
        for (int o = 0; o < kLanes; ++o) sum[o] += numbers[o];
      }
      for (int64_t o = 0; o < rows; ++o) store(db + first + o, static_cast<float>(sum[o]));
    }
    return;
  }
  for (int64_t o = 0; o < out; o += chunk) {
    const int64_t width = std::min(chunk, out - o);
    double sum[chunk] = {};
    for (int64_t begin = 0; begin < n; begin += block) {
      float part[chunk] = {};
      for (int64_t i = begin; i < std::min(n, begin + block); ++i) {
        const T* const x = dz + i * row + o * column;
        if (column == 1)
          for (int64_t c = 0; c < width; ++c) part[c] += load(x[c]);
        else
          for (int64_t c = 0; c < width; ++c) part[c] += load(x[c * column]);
      }
      for (int64_t c = 0; c < width; ++c) sum[c] += part[c];
    }
    for (int64_t c = 0; c < width; ++c) store(db + o + c, static_cast<float>(sum[c]));
  }
}

template <class T>
void fill_gemm(Level& level, DtypeIndex dtype) {
  level.gemm[dtype] = {kTileRows, kPanel, gemm_run<T>, updates_in_place<T>};
  level.sum_rows[dtype] = sum_rows<T>;
}

}  // namespace torchbp::TORCHBP_LEVEL
