// What one SIMD level offers: a table of plain functions, filled in by level.h under each level's target.
#pragma once

#include "../batch.h"
#include "../kernels.h"
#include "../optim.h"

namespace torchbp {

// A column of the table over contiguous arrays.
using ColumnFunction = void (*)(void* const* outputs, const void* const* inputs, int64_t n, double parameter);

// Between a strided array (stride in bytes) and a contiguous one.
using LoadFunction = void (*)(void* to, const char* from, int64_t stride, int64_t n);
using StoreFunction = void (*)(char* to, int64_t stride, const void* from, int64_t n);

// One step of an optimizer on n elements: csrc/cpu/update.h.
using UpdateFunction = void (*)(const Update&, void* parameter, const void* grad, void* state0, void* state1,
                                int64_t n);

// Where a dtype's functions stand in a Level. ops.h has refused every other dtype before.
enum DtypeIndex { kFloat64, kFloat32, kBFloat16, kFloat16, kDtypes };

inline DtypeIndex dtype_index(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      return kFloat16;
  }
}

// Half types are computed in float32.
inline DtypeIndex compute_index(DtypeIndex dtype) { return dtype == kFloat64 ? kFloat64 : kFloat32; }

inline int64_t element_size(DtypeIndex dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

struct Gemm;
struct Scratch;

// The product of gemm.h. A tile of C has at most `rows` rows; a panel of B is `columns` wide.
struct GemmKernels {
  int rows, columns;  // 0 where the level has no products of a dtype
  // Rows [i, i_end) of the panels [begin, end) of `columns` columns.
  void (*run)(const Gemm&, int64_t i, int64_t i_end, int64_t begin, int64_t end, Scratch& scratch);
  // Whether a product's update happens in registers.
  bool (*updates_in_place)(const Gemm&);
};

// The row-wise kernels work on the rows [begin, end) of their description.
struct Level {
  const char* name;
  GemmKernels gemm[kDtypes];
  ColumnFunction column[static_cast<int>(Kernel::count)][kDtypes];
  LoadFunction load[kDtypes];
  StoreFunction store[kDtypes];
  void (*stream[kDtypes])(char* to, const void* from, int64_t n);  // past the caches, between contiguous arrays
  double (*softmax_ce_count[kDtypes])(const SoftmaxCE&, int64_t begin, int64_t end, int64_t& bad_row);
  double (*softmax_ce_forward[kDtypes])(const SoftmaxCE&, int64_t begin, int64_t end);
  void (*softmax_ce_backward[kDtypes])(const SoftmaxCE&, int64_t begin, int64_t end);
  void (*maxout_forward[kDtypes])(const Maxout&, int64_t begin, int64_t end);
  void (*maxout_backward[kDtypes])(const Maxout&, int64_t begin, int64_t end);
  UpdateFunction update[kDtypes];
  void (*batch[kDtypes])(const Batch&, int64_t begin, int64_t end);
  double (*sum_of_squares[kDtypes])(const void* data, int64_t n);
  void (*sum_rows[kDtypes])(const void* dz, int64_t row, int64_t column, int64_t n, int64_t out, void* db);  // as gemm
};

// The level in use.
const Level& level();

const Level& baseline_level();
#if defined(__x86_64__)
const Level& avx2_level();
const Level& avx512_level();
const Level& avx512_bf16_level();
#endif

}  // namespace torchbp
