// Products of float32 matrices, and of bfloat16 where the level has them, with what follows them (bias, activation, its
// gradient, the optimizer's update) done in float32 while a tile of the result is still in registers and L1.
//
// The library's GEMM reaches 85 % of what multiply-adds alone reach on a core of Zen 4, and costs microseconds a call;
// this one reaches 91 % and costs none, which is most of the difference for small networks and a tenth for large ones.
// With AVX2, on Zen 3, both reach 80 %. It works as BLIS does: B in panels of a few vectors, A in tiles of as many rows
// as there are registers, K in blocks that fit the caches; and where they do not, it fetches what comes next during a tile.
// Where C has few columns or rows, factors are read where they lie (gemm_few.h). Every element of C is one sum over k in
// an order that sizes and strides decide: the result depends neither on threads nor on tiles.
#pragma once

#include "../optim.h"
#include "levels.h"

namespace torchbp {

// C [m, n] = epilogue(A [m, k] B [k, n]); strides in elements. All that it reads and writes is of one dtype.
struct Gemm {
  DtypeIndex dtype = kFloat32;
  int64_t m = 0, n = 0, k = 0;
  const void *a = nullptr, *b = nullptr;
  int64_t a_i = 0, a_k = 0, b_k = 0, b_j = 0;
  int64_t b_copies = 1, b_apart = 0;  // of B, and bytes from one to the next: each thread reads its own
  void* c = nullptr;
  int64_t c_i = 0, c_j = 0;
  bool of_parameter = false;  // C is a parameter's gradient, or the parameter itself

  // What becomes of a tile, in this order. The matrices have C's shape and strides.
  const void* bias = nullptr;  // added: an element for each row (bias_of_row) or column
  bool bias_of_row = false;
  void* z = nullptr;                    // written: what an activation that saves its input keeps
  ColumnFunction activation = nullptr;  // y = f(z)
  ColumnFunction gradient = nullptr;    // dz from dy, the product, and `saved`
  const void* saved = nullptr;
  double parameter = 0;            // of activation or gradient
  const Update* update = nullptr;  // the product is the gradient of the parameter C, which is updated: float32 alone
  float *state0 = nullptr, *state1 = nullptr;
};

// Element (i, j) is data[i * row + j * column]. A second factor may lie there more than once, as Gemm says of B.
struct Matrix {
  void* data = nullptr;
  int64_t row = 0, column = 0;
  DtypeIndex dtype = kFloat32;
  int64_t copies = 1, apart = 0;
  Matrix transposed() const { return {data, column, row, dtype, copies, apart}; }
};

// C [m, n] = A [m, k] B [k, n], to be completed with what follows it.
inline Gemm product(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix c) {
  Gemm g;
  g.dtype = c.dtype;
  g.m = m, g.n = n, g.k = k;
  g.a = a.data, g.a_i = a.row, g.a_k = a.column;
  g.b = b.data, g.b_k = b.row, g.b_j = b.column;
  g.b_copies = b.copies, g.b_apart = b.apart;
  g.c = c.data, g.c_i = c.row, g.c_j = c.column;
  return g;
}

// Up to so many rows of C, a large B that lies by rows is read so, and not copied: gemm_few.h.
constexpr int64_t kFewestRows = 24;

// A column of the table in float32, or null for none.
inline ColumnFunction float_column(Kernel kernel) {
  return kernel == Kernel::count ? nullptr : level().column[static_cast<int>(kernel)][kFloat32];
}

// Runs it, on as many threads as pay. The level has to have products of the dtype.
void gemm(const Gemm& gemm);

// Float32 memory of the calling thread, reused from call to call; aligned to a cache line.
struct Scratch {
  float* data = nullptr;
  size_t capacity = 0;
  float* at_least(size_t numbers);
  ~Scratch();
};

}  // namespace torchbp
