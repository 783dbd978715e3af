// Whole networks of narrow layers in a half type: forward in one kernel, backward in one for every few layers, in the
// manner of the fully fused networks of Mueller et al. 2021 (Real-time neural radiance caching for path tracing).
//
// A matrix of activations [n, width] is far larger than a weight, so that time goes where its bytes go. Counted in such
// matrices read or written, for L layers: layer by layer, forward takes 2 L for the products and 2 (L - 1) for the
// activations, backward 5 L for dh, dW and db and 3 (L - 1) for the gradients of the activations: 12 L - 5, or 43 for four
// layers (a ReLU in the epilogue and a bias gradient beside the weight's save 10 of them). Here forward reads x and writes
// every h and y, L + 1; backward reads dy and the input of every layer and writes dx, L + 2, and 2 more for each group of
// layers but one: 11 for four layers of 64, 13 for four of 128. (An activation that saves x has its z written and read
// besides.) Had dz been left to products of their own for dW, it would have been written once and read twice for each
// layer, and h read twice, 3 L - 2 more. So the gradients of weights are summed where dz and h are at hand, in shared
// memory, and dz goes to memory only from one group to the next.
//
// Of multiplications there are L n width^2 forward and 2 L n width^2 backward: for four layers 70 operations for each byte
// that is moved where layers are 64 wide, 120 where they are 128 wide. The tensor cores of an H100 are rated for 300.
//
// Forward: a block keeps the weights in shared memory, and a warp takes 16 rows through all layers; only its own lanes
// wait for each other. Backward: a block takes 128 rows through the layers of a group. A warp multiplies its own 16 rows of
// dz with a weight, and has a part of each gradient dz^T h of all the block's rows, in registers until the last row.
// Every block leaves its sums in memory, and a second kernel adds those up.
//
// Narrower layers are padded with zeros to 64 or 128 in shared memory. Everything is summed in float32 and rounded once,
// bias and activation included; sums depend on sizes alone.
#include <cuda_pipeline.h>

#include <array>
#include <vector>

#define TORCHBP_LEVEL cuda
#include "../check.h"
#include "activation.h"
#include "backend.h"
#include "launch.h"
#include "tensor_core.h"

namespace torchbp {
namespace cuda {
namespace {

constexpr int kWarpRows = 16;
constexpr int kBackwardWarps = 8;
constexpr int kBlockRows = kBackwardWarps * kWarpRows;
template <int width>
constexpr int kForwardWarps = width == 64 ? 8 : 16;
constexpr int kForwardLayers = 8;  // of a launch, if there is shared memory for as many
// Of a launch: as many as there are registers for the gradients of.
template <int width>
constexpr int kBackwardLayers = width == 64 ? 4 : 2;

// Blocks on a multiprocessor together, and for all multiprocessors of an H100. Not asked of the GPU: how sums are split is
// to depend on sizes alone.
template <int width>
constexpr int kForwardBlocks = width == 64 ? 3 : 1;
template <int width>
constexpr int kBackwardBlocks = width == 64 ? 2 : 1;
#ifdef __CUDACC__
constexpr int kMultiprocessors = 132;
#else
constexpr int kMultiprocessors = 3;  // so that on the emulator a block takes several pieces of few rows
#endif

constexpr int64_t kMostRows = 1 << 30;  // of a network: numbers of rows fit an int

unsigned blocks_of(int n, int rows, int together) {
  return std::min((n + rows - 1) / rows, kMultiprocessors * together);
}

// Row `row` of a matrix.
template <class T>
__device__ __forceinline__ T* row_of(void* matrix, int row, int columns) {
  return static_cast<T*>(matrix) + static_cast<int64_t>(row) * columns;
}
template <class T>
__device__ __forceinline__ const T* row_of(const void* matrix, int row, int columns) {
  return static_cast<const T*>(matrix) + static_cast<int64_t>(row) * columns;
}

// ---- between memory and tiles ------------------------------------------------------------------------------------

// Begins to copy the first `there` rows of a matrix into the first `rows` of a tile; what is left of these becomes 0.
template <class T, int width>
__device__ __forceinline__ void read(const Tile<T, width>& to, int rows, const void* from, int columns, int there,
                                     int thread, int threads) {
  constexpr int packs = Tile<T, width>::packs;
#pragma unroll 2
  for (int i = thread; i < rows * packs; i += threads) {
    const int row = i / packs, column = i % packs * 8;
    T* const place = to.at(row, column);
    if (row < there && column < columns)
      __pipeline_memcpy_async(place, static_cast<const T*>(from) + row * columns + column, 16);
    else
      *reinterpret_cast<Pack<T>*>(place) = Pack<T>{};
  }
  __pipeline_commit();
}

// Writes a warp's rows, of which `there` are in the matrix.
template <class T, int width>
__device__ __forceinline__ void write(T* to, int columns, int there, const Tile<T, width>& from) {
  constexpr int packs = Tile<T, width>::packs;
#pragma unroll
  for (int begin = 0; begin < kWarpRows * packs; begin += 32) {
    const int i = begin + threadIdx.x % 32, row = i / packs, column = i % packs * 8;
    if (row < there && column < columns)
      *reinterpret_cast<Pack<T>*>(to + row * columns + column) =
          *reinterpret_cast<const Pack<T>*>(from.at(row, column));
  }
}

// ---- products of a warp's rows with a weight ---------------------------------------------------------------------

// Columns of a product that a warp makes at a time, in blocks of 8: as many as there are registers for.
template <int width>
constexpr int kColumns = width == 64 ? 16 : 32;
template <int width>
using Columns = float[kColumns<width> / 8][4];

// The fragments of a warp's rows, 16 columns each.
template <class T, int width>
struct Rows {
  uint32_t fragment[width / 16][4];

  __device__ __forceinline__ void read(const Tile<T, width>& from) {
#pragma unroll
    for (int k = 0; k < width / 16; ++k) load_blocks<false>(fragment[k], from.down(0, 16 * k));
  }

  // c: the columns from `begin` on of rows W^T, or of rows W.
  template <bool by_transpose>
  __device__ __forceinline__ void multiply(Columns<width>& c, const Tile<T, width>& weight, int begin) const {
#pragma unroll
    for (auto& block : c)
#pragma unroll
      for (float& number : block) number = 0;
#pragma unroll
    for (int k = 0; k < width / 16; ++k) {
#pragma unroll
      for (int t = 0; t < kColumns<width> / 8; t += 2) {
        uint32_t b[4];
        const int column = begin + 8 * t;
        if constexpr (by_transpose)
          load_blocks<false>(b, weight.across(column, 16 * k));
        else
          load_blocks<true>(b, weight.down(16 * k, column));
        multiply_add<T>(c[t], fragment[k], b[0], b[1]);
        multiply_add<T>(c[t + 1], fragment[k], b[2], b[3]);
      }
    }
  }
};

// f(row, column, pair) for each pair of neighbours that a lane holds of what multiply() made.
template <int blocks, class F>
__device__ __forceinline__ void for_each_pair(const float (&c)[blocks][4], int begin, const F& f) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int block = 0; block < blocks; ++block)
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const float pair[2] = {c[block][2 * below], c[block][2 * below + 1]};
      f(g + 8 * below, begin + 8 * block + 2 * t, pair);
    }
}

template <class T>
using Pair = Pack<T, 2>;

template <class T>
__device__ __forceinline__ Pair<T>& pair_at(T* place) {
  return *reinterpret_cast<Pair<T>*>(place);
}
template <class T>
__device__ __forceinline__ const Pair<T>& pair_at(const T* place) {
  return *reinterpret_cast<const Pair<T>*>(place);
}

// ---- forward -----------------------------------------------------------------------------------------------------

struct ForwardLayer {
  const void *weight, *bias;  // [out, in], [out]; bias: null for none
  int in, out;
  Kernel f;     // count: none
  void *h, *z;  // [n, out]: f(z), and what is rounded of z; z: null if nothing needs it
};
struct Forward {
  int n, layers;
  const void* x;  // [n, in of the first]
  float parameter;
  ForwardLayer layer[kForwardLayers];
};

template <class T, int width>
constexpr size_t forward_bytes(int layers) {
  return sizeof(T) * (layers * (width * width + width) + kForwardWarps<width> * kWarpRows * width);
}

template <class T, int width>
__global__ void __launch_bounds__(32 * kForwardWarps<width>, kForwardBlocks<width>)
    narrow_forward(const __grid_constant__ Forward a) {
  // The weights, the rows of each warp, the biases.
  const Tile<T, width> weights{static_cast<T*>(dynamic_shared())};
  const int warp = threadIdx.x / 32;
  const Tile<T, width> all_rows = weights.from_row(a.layers * width), rows = all_rows.from_row(warp * kWarpRows);
  T* const biases = all_rows.from_row(kForwardWarps<width> * kWarpRows).data;
  for (int i = 0; i < a.layers; ++i) {
    const ForwardLayer& layer = a.layer[i];
    read(weights.from_row(i * width), width, layer.weight, layer.in, layer.out, threadIdx.x, blockDim.x);
    for (int c = threadIdx.x; c < width; c += blockDim.x)
      biases[i * width + c] = layer.bias && c < layer.out ? static_cast<const T*>(layer.bias)[c] : T(0);
  }
  __pipeline_wait_prior(0);
  __syncthreads();

  const int step = kForwardWarps<width> * kWarpRows * gridDim.x;
  for (int first = (blockIdx.x + warp * gridDim.x) * kWarpRows; first < a.n; first += step) {
    const int there = a.n - first, in = a.layer[0].in;
    __syncwarp();
    read(rows, kWarpRows, row_of<T>(a.x, first, in), in, there, threadIdx.x % 32, 32);
    __pipeline_wait_prior(0);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < a.layers; ++i) {
      const ForwardLayer& layer = a.layer[i];
      Rows<T, width> x;
      x.read(rows);
      __syncwarp();
      T* const saved = layer.z ? row_of<T>(layer.z, first, layer.out) : nullptr;
#pragma unroll 1
      for (int begin = 0; begin < width; begin += kColumns<width>) {
        Columns<width> c;
        x.template multiply<true>(c, weights.from_row(i * width), begin);
        with_forward(layer.f, [&](auto column_of_f) {
          for_each_pair(c, begin, [&](int row, int column, const float (&pair)[2]) {
            const Pair<T> bias = pair_at(biases + i * width + column);
            Pair<T> z, h{};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const float of_z[1] = {pair[j] + load(bias.value[j])};
              float of_h[1];
              decltype(column_of_f)::apply(of_z, of_h, a.parameter);
              store(&z.value[j], of_z[0]);
              store(&h.value[j], column < layer.out ? of_h[0] : 0);
            }
            pair_at(rows.at(row, column)) = h;
            if (saved && row < there && column < layer.out) pair_at(saved + row * layer.out + column) = z;
          });
        });
      }
      __syncwarp();
      write(row_of<T>(layer.h, first, layer.out), layer.out, there, rows);
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------------------------

struct BackwardLayer {
  const void *weight, *h;  // [out, in], and the layer's input [n, in]
  const void* saved;       // [n, in]: what f' of the layer below is to read, if that is not h
  int in, out;
  Kernel f;  // the gradient column of the layer below; count: none
  int64_t
      sum;  // where a block's sums for dW [out, in] begin, and behind them those for db [out]; -1: neither is needed
};
struct Backward {
  int n, layers;
  const void* dz;  // [n, out of the last]
  void* dx;        // [n, in of the first]: dz of the layer below, or the input's gradient; null: not needed
  float parameter;
  float* sums;  // [blocks][size]
  int64_t size;
  BackwardLayer layer[kBackwardLayers<64>];
};

// Whether a block reads dz of its next rows while it has others in hand: where it is alone on its multiprocessor, nothing
// else would go on meanwhile.
template <int width>
constexpr bool kReadsAhead = kBackwardBlocks<width> == 1;

template <class T, int width>
constexpr size_t backward_bytes(int layers) {
  return sizeof(T) * (layers * width * width + (kReadsAhead<width> ? 4 : 3) * kBlockRows * width) +
         sizeof(float) * layers * width;
}

// A warp's part of dW = dz^T h: a half of its rows and a quarter of its columns. And of db, the sums of dz over the rows,
// those of one of these blocks of 16 rows, or none: products with ones, summed up in shared memory.
template <class T, int width>
struct Gradient {
  static constexpr int down = width / 32, across = width / 32;  // blocks of 16 rows, of 8 columns
  float dw[down][across][4];

  __device__ __forceinline__ static int quarter() { return threadIdx.x / 32 % 4; }
  __device__ __forceinline__ static int top() { return threadIdx.x / 128 * (width / 2); }
  __device__ __forceinline__ static int left() { return quarter() * (width / 4); }

  // f(row, element) for this lane's elements of db.
  template <class F>
  __device__ __forceinline__ static void for_each_bias(const F& f) {
    if (quarter() >= down || threadIdx.x % 4 != 0) return;
    const int row = top() + 16 * quarter() + threadIdx.x % 32 / 4;
    f(row, 0);
    f(row + 8, 2);
  }

  __device__ __forceinline__ void clear(float* db) {
#pragma unroll
    for (auto& row : dw)
#pragma unroll
      for (auto& block : row)
#pragma unroll
        for (float& sum : block) sum = 0;
    for_each_bias([&](int row, int) { db[row] = 0; });
  }

  __device__ __forceinline__ void add(const Tile<T, width>& dz, const Tile<T, width>& h, float* db) {
    const uint32_t ones = bits<uint32_t>(Pair<T>{T(1), T(1)});
    float of_rows[4] = {};
#pragma unroll 1
    for (int k = 0; k < kBlockRows; k += 16) {
      uint32_t of_h[across / 2][4];
#pragma unroll
      for (int t = 0; t < across / 2; ++t) load_blocks<true>(of_h[t], h.down(k, left() + 16 * t));
#pragma unroll
      for (int m = 0; m < down; ++m) {
        uint32_t of_dz[4];
        load_blocks<true>(of_dz, dz.across(k, top() + 16 * m));
#pragma unroll
        for (int t = 0; t < across; ++t)
          multiply_add<T>(dw[m][t], of_dz, of_h[t / 2][t % 2 * 2], of_h[t / 2][t % 2 * 2 + 1]);
        if (m == quarter()) multiply_add<T>(of_rows, of_dz, ones, ones);
      }
    }
    for_each_bias([&](int row, int element) { db[row] += of_rows[element]; });
  }

  __device__ __forceinline__ void write(float* to, int out, int in, const float* db) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < down; ++m)
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int row = top() + 16 * m + 8 * below + g;
        if (row >= out) continue;
#pragma unroll
        for (int block = 0; block < across; ++block) {
          const int column = left() + 8 * block + 2 * t;
          if (column < in)
            pair_at(to + row * in + column) = Pair<float>{dw[m][block][2 * below], dw[m][block][2 * below + 1]};
        }
      }
    for_each_bias([&](int row, int) {
      if (row < out) to[out * in + row] = db[row];
    });
  }
};

template <class T, int width>
__global__ void __launch_bounds__(32 * kBackwardWarps, kBackwardBlocks<width>)
    narrow_backward(const __grid_constant__ Backward a) {
  constexpr int most = kBackwardLayers<width>;
  // The weights, dz of the block's rows, h of them twice (one layer's is read while another's is used), and db.
  const Tile<T, width> weights{static_cast<T*>(dynamic_shared())};
  const Tile<T, width> dzs = weights.from_row(a.layers * width);
  const Tile<T, width> hs = dzs.from_row((kReadsAhead<width> ? 2 : 1) * kBlockRows);
  float* const db = reinterpret_cast<float*>(hs.from_row(2 * kBlockRows).data);
  const int warp = threadIdx.x / 32;
  for (int i = 0; i < a.layers; ++i)
    read(weights.from_row(i * width), width, a.layer[i].weight, a.layer[i].in, a.layer[i].out, threadIdx.x, blockDim.x);

  int now = 0, now_dz = 0;  // which of two
  const auto h_of = [&](int which) { return hs.from_row(which * kBlockRows); };
  const auto dz_of = [&](int which) { return dzs.from_row(kReadsAhead<width> ? which * kBlockRows : 0); };
  const auto own_of = [&](int which) { return dz_of(which).from_row(warp * kWarpRows); };
  const auto begin_h = [&](int i, int row, int which) {
    const int in = a.layer[i].in;
    read(h_of(which), kBlockRows, row_of<T>(a.layer[i].h, row, in), in, a.n - row, threadIdx.x, blockDim.x);
  };
  const auto begin_dz = [&](int row, int which) {
    const int first = row + warp * kWarpRows, out = a.layer[a.layers - 1].out;
    read(own_of(which), kWarpRows, row_of<T>(a.dz, first, out), out, a.n - first, threadIdx.x % 32, 32);
  };
  Gradient<T, width> gradient[most];
#pragma unroll
  for (int i = 0; i < most; ++i)
    if (i < a.layers) gradient[i].clear(db + i * width);

  const int step = gridDim.x * kBlockRows;
  begin_h(a.layers - 1, blockIdx.x * kBlockRows, now);
  if (kReadsAhead<width>) begin_dz(blockIdx.x * kBlockRows, now_dz);
  for (int row = blockIdx.x * kBlockRows; row < a.n; row += step) {
    const int first = row + warp * kWarpRows, there = a.n - first;  // of the warp's rows
    const Tile<T, width> dz = dz_of(now_dz), own = own_of(now_dz);
    if (!kReadsAhead<width>) begin_dz(row, now_dz);
#pragma unroll
    for (int i = most - 1; i >= 0; --i) {
      if (i >= a.layers) continue;
      const BackwardLayer& layer = a.layer[i];
      __pipeline_wait_prior(0);
      __syncthreads();
      if (i > 0) {
        begin_h(i - 1, row, now ^ 1);
      } else if (row + step < a.n) {
        begin_h(a.layers - 1, row + step, now ^ 1);
        if (kReadsAhead<width>) begin_dz(row + step, now_dz ^ 1);
      }
      if (layer.sum >= 0) gradient[i].add(dz, h_of(now), db + i * width);
      if (i > 0 || a.dx) {
        Rows<T, width> rows;
        rows.read(own);
        __syncthreads();
        const Tile<T, width> h = h_of(now).from_row(warp * kWarpRows);
        const T* const saved = layer.saved ? row_of<T>(layer.saved, first, layer.in) : nullptr;
#pragma unroll 1
        for (int begin = 0; begin < width; begin += kColumns<width>) {
          Columns<width> c;
          rows.template multiply<false>(c, weights.from_row(i * width), begin);
          with_backward(layer.f, [&](auto column_of_f) {
            for_each_pair(c, begin, [&](int r, int column, const float (&pair)[2]) {
              const bool within = r < there && column < layer.in;
              Pair<T> of_saved{}, result;
              if (!saved)
                of_saved = pair_at(h.at(r, column));
              else if (within)
                of_saved = pair_at(saved + r * layer.in + column);
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                const float given[2] = {pair[j], load(of_saved.value[j])};
                float made[1];
                decltype(column_of_f)::apply(given, made, a.parameter);
                store(&result.value[j], within ? made[0] : 0);
              }
              pair_at(own.at(r, column)) = result;
            });
          });
        }
        if (i == 0) {
          __syncwarp();
          write(row_of<T>(a.dx, first, layer.in), layer.in, there, own);
          __syncwarp();
        }
      } else {
        __syncthreads();
      }
      now ^= 1;
    }
    now_dz ^= 1;
  }
#pragma unroll
  for (int i = 0; i < most; ++i)
    if (i < a.layers && a.layer[i].sum >= 0)
      gradient[i].write(a.sums + blockIdx.x * a.size + a.layer[i].sum, a.layer[i].out, a.layer[i].in, db + i * width);
}

// ---- sums over the blocks ----------------------------------------------------------------------------------------

// Where sums from `begin` on go.
struct Part {
  int64_t begin;
  void* to;  // null: not needed
};
struct Sums {
  const float* of_blocks;  // [blocks][size]
  int64_t blocks, size;
  int parts;
  Part part[2 * kBackwardLayers<64>];
};

constexpr int kSlices = 8;  // of the blocks, each of which a warp adds up

template <class T>
__global__ void __launch_bounds__(32 * kSlices) narrow_sums(const __grid_constant__ Sums a) {
  __shared__ float of_slice[kSlices][32];
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (i < a.size) {
#pragma unroll 4
    for (int64_t block = slice; block < a.blocks; block += kSlices) sum += a.of_blocks[block * a.size + i];
  }
  of_slice[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || i >= a.size) return;
#pragma unroll
  for (int other = 1; other < kSlices; ++other) sum += of_slice[other][lane];
  int part = 0;
  while (part + 1 < a.parts && i >= a.part[part + 1].begin) ++part;
  if (a.part[part].to) store(static_cast<T*>(a.part[part].to) + (i - a.part[part].begin), sum);
}

// ---- launches ----------------------------------------------------------------------------------------------------

template <int n>
using Width = std::integral_constant<int, n>;

// f(zero of the half type, width that a network is padded to)
template <class F>
void with_network(ScalarType dtype, const std::vector<torch::stable::Tensor>& weights, const F& f) {
  bool wide = false;
  for (const auto& weight : weights) wide |= weight.size(0) > 64 || weight.size(1) > 64;
  const auto with_width = [&](auto zero) { wide ? f(zero, Width<128>()) : f(zero, Width<64>()); };
  dtype == ScalarType::Half ? with_width(Half()) : with_width(BFloat16());
}

int64_t most_shared(int32_t device) {
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return most;
}

// How many layers a launch takes: `most`, or those that there is shared memory for.
template <class F>
int layers_of_a_launch(int most, int64_t shared, const F& bytes) {
  while (most > 0 && static_cast<int64_t>(bytes(most)) > shared) --most;
  return most;
}

int rows_of(const torch::stable::Tensor& x) { return static_cast<int>(x.numel() / x.size(x.dim() - 1)); }

// Whether copies of 16 bytes can be made of a matrix, or of several of one width one after the other.
bool packed(const torch::stable::Tensor& t) {
  return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

}  // namespace
}  // namespace cuda

using torch::stable::Tensor;

// Two layers or more of 16, 32, ..., 128 numbers, if a block of this GPU has memory for them. Whatever else is wrong with
// the arguments ops.h finds out.
bool Cuda::fits_network(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Half && dtype != ScalarType::BFloat16) return false;
  const auto like_x = [&](const Tensor& t) { return t.scalar_type() == dtype && t.device() == x.device(); };
  const auto fits = [](int64_t size) { return size % 16 == 0 && size >= 16 && size <= 128; };
  if (weights.size() < 2 || x.numel() == 0 || x.numel() / x.size(x.dim() - 1) > cuda::kMostRows || !cuda::packed(x))
    return false;
  int64_t features = x.size(x.dim() - 1);
  for (const Tensor& w : weights) {
    if (w.dim() != 2 || !like_x(w) || !cuda::packed(w) || w.size(1) != features || !fits(features)) return false;
    features = w.size(0);
  }
  if (!fits(features)) return false;
  for (size_t i = 0; i < biases.size(); ++i)
    if (!like_x(biases[i]) || !biases[i].is_contiguous() || !has_shape(biases[i], {weights[i].size(0)})) return false;
  bool enough = false;
  const int64_t shared = cuda::most_shared(x.get_device_index());
  cuda::with_network(dtype, weights, [&](auto zero, auto width) {
    using T = decltype(zero);
    enough =
        static_cast<int64_t>(std::max(cuda::forward_bytes<T, width>(1), cuda::backward_bytes<T, width>(1))) <= shared;
  });
  return enough;
}

bool Cuda::fits_saved(const std::vector<Tensor>& saved, int64_t) {
  return std::all_of(saved.begin(), saved.end(), cuda::packed);
}

std::vector<Tensor> Cuda::mlp(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                              const Activation& f, double parameter) {
  const int layers = static_cast<int>(weights.size());
  const int32_t device = x.get_device_index();
  std::vector<Tensor> result(1);
  const auto new_rows = [&](const Tensor& weight) {
    std::vector<int64_t> shape = sizes_of(x);
    shape.back() = weight.size(0);
    return empty(shape, x.scalar_type(), x);
  };
  const cuda::Launch launch("mlp", device);
  cuda::with_network(x.scalar_type(), weights, [&](auto zero, auto width) {
    using T = decltype(zero);
    const int most =
        cuda::layers_of_a_launch(cuda::kForwardLayers, cuda::most_shared(device), cuda::forward_bytes<T, width>);
    cuda::Forward a{
        .n = cuda::rows_of(x), .layers = 0, .x = x.const_data_ptr(), .parameter = static_cast<float>(parameter)};
    for (int begin = 0; begin < layers; begin += a.layers) {
      a.layers = std::min(most, layers - begin);
      for (int i = 0; i < a.layers; ++i) {
        const Tensor& weight = weights[begin + i];
        const bool last = begin + i + 1 == layers;
        const Tensor h = new_rows(weight);
        void* z = nullptr;
        if (f.saves_x && !last) {
          result.push_back(new_rows(weight));
          z = result.back().mutable_data_ptr();
        }
        if (last)
          result[0] = h;
        else
          result.push_back(h);
        a.layer[i] = {.weight = weight.const_data_ptr(),
                      .bias = biases.empty() ? nullptr : biases[begin + i].const_data_ptr(),
                      .in = static_cast<int>(weight.size(1)),
                      .out = static_cast<int>(weight.size(0)),
                      .f = last ? Kernel::count : f.forward,
                      .h = h.mutable_data_ptr(),
                      .z = z};
      }
      launch.with_shared(cuda::forward_bytes<T, width>(a.layers), cuda::narrow_forward<T, width>,
                         cuda::blocks_of(a.n, cuda::kWarpRows, cuda::kForwardBlocks<width>),
                         32 * cuda::kForwardWarps<width>, a);
      a.x = a.layer[a.layers - 1].h;
    }
  });
  return result;
}

std::vector<Tensor> Cuda::mlp_backward(const Tensor& dy_, const Tensor& x, const std::vector<Tensor>& weights,
                                       const std::vector<Tensor>& saved, const Activation& f, double parameter,
                                       bool need_x, const std::vector<int64_t>& need_weights,
                                       const std::vector<int64_t>& need_biases) {
  const int layers = static_cast<int>(weights.size()), per_layer = f.saves_x ? 2 : 1;
  const int32_t device = x.get_device_index();
  std::vector<Tensor> result(1 + layers + need_biases.size());
  const auto needs_bias = [&](int i) { return !need_biases.empty() && need_biases[i]; };
  int lowest = 0;  // the first layer that anything is asked of
  if (!need_x)
    while (lowest < layers && !need_weights[lowest] && !needs_bias(lowest)) ++lowest;
  if (need_x) result[0] = empty(x.sizes(), x.scalar_type(), x);

  Tensor dz = dense(dy_);
  if (!cuda::packed(dz)) dz = torch::stable::clone(dz);
  const cuda::Launch launch("mlp_backward", device);
  cuda::with_network(x.scalar_type(), weights, [&](auto zero, auto width) {
    using T = decltype(zero);
    const int most = cuda::layers_of_a_launch(cuda::kBackwardLayers<width>, cuda::most_shared(device),
                                              cuda::backward_bytes<T, width>);
    const int n = cuda::rows_of(x);
    const unsigned blocks = cuda::blocks_of(n, cuda::kBlockRows, cuda::kBackwardBlocks<width>);
    for (int end = layers; end > lowest;) {
      const int begin = std::max(lowest, end - most);
      cuda::Backward a{.n = n,
                       .layers = end - begin,
                       .dz = dz.const_data_ptr(),
                       .dx = nullptr,
                       .parameter = static_cast<float>(parameter),
                       .sums = nullptr,
                       .size = 0};
      cuda::Sums sums{.blocks = blocks, .parts = 0};
      for (int i = begin; i < end; ++i) {
        const int64_t out = weights[i].size(0), in = weights[i].size(1);
        cuda::BackwardLayer& layer = a.layer[i - begin];
        layer = {.weight = weights[i].const_data_ptr(),
                 .h = (i == 0 ? x : saved[i * per_layer - 1]).const_data_ptr(),
                 .saved = i > 0 && f.saves_x ? saved[(i - 1) * per_layer].const_data_ptr() : nullptr,
                 .in = static_cast<int>(in),
                 .out = static_cast<int>(out),
                 .f = i > 0 ? f.backward : Kernel::count,
                 .sum = -1};
        if (!need_weights[i] && !needs_bias(i)) continue;
        const auto make = [&](bool needed, int64_t at, Sizes sizes, int64_t numel) {
          void* to = nullptr;
          if (needed) {
            result[at] = empty(sizes, x.scalar_type(), x);
            to = result[at].mutable_data_ptr();
          }
          sums.part[sums.parts++] = {a.size, to};
          a.size += numel;
        };
        layer.sum = a.size;
        make(need_weights[i], 1 + i, {out, in}, out * in);
        make(needs_bias(i), 1 + layers + i, {out}, out);
      }
      Tensor below = begin == 0 ? result[0] : Tensor();
      if (begin > lowest) below = empty({n, weights[begin].size(1)}, x.scalar_type(), x);
      if (begin > lowest || need_x) a.dx = below.mutable_data_ptr();
      Tensor of_blocks;
      if (a.size > 0) {
        of_blocks = empty({blocks * a.size}, ScalarType::Float, x);
        a.sums = floats_of(of_blocks);
      }
      launch.with_shared(cuda::backward_bytes<T, width>(a.layers), cuda::narrow_backward<T, width>, blocks,
                         32 * cuda::kBackwardWarps, a);
      if (a.size > 0) {
        sums.of_blocks = a.sums;
        sums.size = a.size;
        launch(cuda::narrow_sums<T>, cuda::blocks_for(a.size, 32), 32 * cuda::kSlices, sums);
      }
      dz = below;
      end = begin;
    }
  });
  for (Tensor& t : result)
    if (!t.defined()) t = nothing(x);
  return result;
}

// No layer alone fits.
std::tuple<Tensor, Tensor> Cuda::linear(const Tensor&, const Tensor&, const std::optional<Tensor>&, const Activation&,
                                        double) {
  STD_TORCH_CHECK(false, "torchbp::linear: CUDA has no product of a layer alone");
}
std::array<Tensor, 3> Cuda::affine_backward(const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                                            bool, bool, bool) {
  STD_TORCH_CHECK(false, "torchbp::linear_backward: CUDA has no product of a layer alone");
}

}  // namespace torchbp
