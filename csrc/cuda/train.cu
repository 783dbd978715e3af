// Steps of training a multi-layer perceptron on a GPU without autograd: the trainers of ../trainer.h.
//
// A small network lives in one block of threads: its shared memory holds every weight, bias and activation (and the
// optimizer's state where there is room), and the kernel runs all steps of a call before it writes them back. What does
// not fit there is done in PyTorch's operations, captured as a CUDA graph (torchbp/optim/on_gpu.py): for that a trainer
// keeps the numbers of the update where the graph's kernel reads them, so that they can change from step to step.
//
// The products of the block. Activations are kept feature-major, [features][n], weights as they are, [out][in], and the
// input as it comes, [n][in]: then each of the three products of a layer reads both factors in packs of four numbers,
// along the sum or across it, and nothing is ever transposed. A thread makes a tile of 4 x 4, for which it reads 8 packs
// for 64 multiplications. Where packs run along the sum a thread has the rows r, r + m, r + 2 m, r + 3 m, so that
// neighbours read neighbouring rows; these lie an odd number of packs apart (spread), in banks of their own. The threads
// of a warp are laid out in Z-order over 4 x 8 tiles: then of each half of a warp the lanes i and i ^ 1, or i and i ^ 2,
// read the same pack, which memory serves at once. What pads rows and columns is 0 and stays so.
#include <torch/csrc/stable/library.h>

#include <optional>

#define TORCHBP_LEVEL cuda
#include "../softmax_ce.h"
#include "../trainer.h"
#include "activation.h"
#include "group.h"
#include "launch.h"
#include "rules.h"

namespace torchbp {
namespace cuda {
namespace {

constexpr int kTile = 4;         // rows and columns of a thread's tile
constexpr int kMostWarps = 32;   // of the block
constexpr int kFewestWarps = 8;  // of it: copies and the softmax have work for as many
constexpr int kMostLayers = 12;
constexpr int kMostRules = 2 * kMostLayers;

// ---- the block's memory ------------------------------------------------------------------------------------------

// A parameter and what the optimizer keeps for it. Places are numbers of float32 from the start of shared memory.
struct Kept {
  float* data = nullptr;                 // in global memory; null: there is none
  float* state[2] = {nullptr, nullptr};  // likewise
  int at = 0, state_at[2] = {-1, -1};    // in shared memory; -1: not there
  int rule = -1;                         // its number; -1: frozen
};

struct BlockLayer {
  int in, out, ld;  // ld: from row to row of the weight
  Kept weight, bias;
  int h, z;  // [out][columns]; not of the last layer
};

// A network and its batch as the kernel takes them.
struct Block {
  int layers = 0, lowest = 0;        // lowest: the first layer that is trained; `layers` if none is
  int n = 0, columns = 0;            // examples, and from row to row of activations
  int x = 0, x_ld = 0, targets = 0;  // the batch
  int logits = 0, gradient = 0;      // [n][classes], and the gradient of them as [classes][columns]
  int row_loss = 0, total = 0, rules = 0;
  int rule_count = 0, floats = 0;
  Kernel forward = Kernel::count, backward = Kernel::count;  // of the activation
  bool saves_x = false;
  float parameter = 0;
  double label_smoothing = 0;
  BlockLayer layer[kMostLayers];
};

// What becomes of the parameters in one step.
struct Rules {
  AnyRule rule[kMostRules];
};

__host__ __device__ constexpr int round_up(int k) { return (k + kTile - 1) / kTile * kTile; }
// Numbers from row to row: whole packs, an odd number of them.
constexpr int spread(int k) { return round_up(k) | kTile; }

// ---- tiles -------------------------------------------------------------------------------------------------------

__host__ __device__ constexpr int strips(int rows) { return (rows + kTile - 1) / kTile; }
__host__ __device__ constexpr int warp_tiles(int rows, int columns) {
  return (strips(rows) + 3) / 4 * ((strips(columns) + 7) / 8);
}

// Which strips of the rows and of the columns a thread's tile is made of, in a given one of the warps' tiles.
struct Place {
  int row, column;
  bool here;

  __device__ __forceinline__ Place(int tile, int rows, int columns) {
    const int lane = threadIdx.x % 32, across = (strips(columns) + 7) / 8;
    const int down = across > 0 ? tile / across : 0;
    row = down * 4 + ((lane >> 1 & 1) | (lane >> 2 & 2));
    column = (tile - down * across) * 8 + ((lane & 1) | (lane >> 1 & 2) | (lane >> 2 & 4));
    here = row < strips(rows) && column < strips(columns);
  }
};

// Row j of a strip. along: whether packs run along the sum; else they run across it, over the four rows of a strip.
template <bool along>
__device__ __forceinline__ int row_of(int strip, int j, int rows) {
  return along ? strip + j * strips(rows) : strip * kTile + j;
}

// A factor of a product, in shared memory: rows [ld] along the sum, or numbers of it [ld] across.
struct Factor {
  const float* data;
  int ld, rows;
};

template <bool along>
class Strip {
public:
  // Rows that pad the last strips are there.
  __device__ __forceinline__ Strip(const Factor& f, int strip)
      : data_(f.data + strip * (along ? f.ld : kTile)), step_(along ? strips(f.rows) * f.ld : f.ld) {}

  // Numbers k, k + 1, ... of each row: to[number][row].
  template <int pace>
  __device__ __forceinline__ void read(int k, float (&to)[pace][kTile]) const {
    static_assert(!along || pace == kTile);
    const float* const from = data_ + (along ? k : k * step_);
#pragma unroll
    for (int j = 0; j < pace; ++j) {
      const auto pack = *reinterpret_cast<const Pack<float>*>(from + j * step_);
#pragma unroll
      for (int i = 0; i < kTile; ++i)
        if constexpr (along)
          to[i][j] = pack.value[i];
        else
          to[j][i] = pack.value[i];
    }
  }

private:
  const float* data_;
  int step_;
};

// sum[i][j] = sum over k < depth of a[row i][k] b[row j][k], in the order of k.
template <bool a_along, bool b_along>
__device__ __forceinline__ void product(const Factor& a, const Factor& b, int depth, const Place& place,
                                        float (&sum)[kTile][kTile]) {
  const Strip<a_along> strip_a(a, place.row);
  const Strip<b_along> strip_b(b, place.column);
#pragma unroll
  for (int i = 0; i < kTile; ++i)
#pragma unroll
    for (int j = 0; j < kTile; ++j) sum[i][j] = 0;
  // Across the sum it need not be four numbers at a time: fewer registers, of which backward has none to spare
  // (gradient_below).
  constexpr int pace = a_along || b_along ? kTile : kTile / 2;
#pragma unroll 1
  for (int k = 0; k < depth; k += pace) {
    float of_a[pace][kTile], of_b[pace][kTile];
    strip_a.read(k, of_a);
    strip_b.read(k, of_b);
#pragma unroll
    for (int q = 0; q < pace; ++q)
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int j = 0; j < kTile; ++j) sum[i][j] += of_a[q][i] * of_b[q][j];
  }
}

// ---- the threads of the block ------------------------------------------------------------------------------------

// Copies a matrix, with all threads of the block.
__device__ __forceinline__ void copy(float* __restrict__ to, int to_ld, const float* __restrict__ from, int from_ld,
                                     int rows, int columns) {
  const auto by = [&](auto pack) {
    using P = decltype(pack);
    const int width = columns / P::size;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
      const int row = i / width, k = (i - row * width) * P::size;
      *reinterpret_cast<P*>(to + row * to_ld + k) = *reinterpret_cast<const P*>(from + row * from_ld + k);
    }
  };
  const bool packed = (to_ld | from_ld | columns) % kTile == 0 &&
                      (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % sizeof(Pack<float>) == 0;
  packed ? by(Pack<float>()) : by(Pack<float, 1>());
}

// The block at work. Every method is called by all of its threads.
class Network {
public:
  __device__ __forceinline__ explicit Network(const Block& block)
      : b_(block),
        memory_(static_cast<float*>(dynamic_shared())),
        warp_(threadIdx.x / 32),
        warps_(blockDim.x / 32),
        total_(memory_ + block.total),
        targets_(reinterpret_cast<int64_t*>(memory_ + block.targets)),
        rules_(reinterpret_cast<AnyRule*>(memory_ + block.rules)) {}

  __device__ __forceinline__ void load() const {
    for (int i = threadIdx.x; i < b_.floats / kTile; i += blockDim.x)
      reinterpret_cast<Pack<float>*>(memory_)[i] = {{0, 0, 0, 0}};
    __syncthreads();
    for_parameters([&](const Kept& kept, int rows, int columns, int ld) {
      copy(memory_ + kept.at, ld, kept.data, columns, rows, columns);
      for (int s = 0; s < 2; ++s)
        if (kept.state_at[s] >= 0) copy(memory_ + kept.state_at[s], ld, kept.state[s], columns, rows, columns);
    });
  }

  __device__ __forceinline__ void store() const {
    for_parameters([&](const Kept& kept, int rows, int columns, int ld) {
      if (kept.rule < 0) return;
      copy(kept.data, columns, memory_ + kept.at, ld, rows, columns);
      for (int s = 0; s < 2; ++s)
        if (kept.state_at[s] >= 0) copy(kept.state[s], columns, memory_ + kept.state_at[s], ld, rows, columns);
    });
  }

  // One step; the loss before it, and the logits if there is somewhere to write them.
  __device__ __forceinline__ void step(const float* x, const int64_t* targets, const AnyRule* rules, float* loss,
                                       float* logits) const {
    load_batch(x, targets, rules);
    __syncthreads();
    for (int l = 0; l < b_.layers; ++l) {
      if (l == 0)
        forward<true>(b_.layer[l], {memory_ + b_.x, b_.x_ld, b_.n}, l + 1 == b_.layers);
      else
        forward<false>(b_.layer[l], activations(b_.layer[l - 1].h, b_.n), l + 1 == b_.layers);
      __syncthreads();
    }
    softmax_ce(logits);
    __syncthreads();
    if (warp_ == warps_ - 1) {
      const double lost = group_.sum_of(b_.n, [&](int64_t i) { return memory_[b_.row_loss + i]; });
      if (group_.rank == 0) *loss = static_cast<float>(lost / *total_);
    }
    for (int l = b_.layers - 1; l > b_.lowest; --l) backward(l);
    if (b_.lowest < b_.layers) update_lowest();
    __syncthreads();
  }

private:
  // f(parameter, rows, columns, from row to row in shared memory)
  template <class F>
  __device__ __forceinline__ void for_parameters(const F& f) const {
    for (int l = 0; l < b_.layers; ++l) {
      const BlockLayer& layer = b_.layer[l];
      f(layer.weight, layer.out, layer.in, layer.ld);
      if (layer.bias.data) f(layer.bias, 1, layer.out, layer.out);
    }
  }

  // Activations as a factor: packs run along `rows` features, or across as many examples.
  __device__ __forceinline__ Factor activations(int at, int rows) const { return {memory_ + at, b_.columns, rows}; }

  __device__ __forceinline__ void load_batch(const float* x, const int64_t* targets, const AnyRule* rules) const {
    const int in = b_.layer[0].in;
    copy(memory_ + b_.x, b_.x_ld, x, in, b_.n, in);
    for (int i = threadIdx.x; i < b_.n; i += blockDim.x) targets_[i] = targets[i];
    for (int i = threadIdx.x; i < b_.rule_count; i += blockDim.x) rules_[i] = rules[i];
    if (warp_ != warps_ - 1) return;  // what a mean divides by
    const SoftmaxCE ce = describe(targets);
    const double counted = group_.sum_of(b_.n, [&](int64_t i) {
      const Row<float> row(ce, i);
      return !row.ignored() && row.in_range();
    });
    if (group_.rank == 0) *total_ = static_cast<float>(counted);
  }

  // The logits, and their gradient in the same place.
  __device__ __forceinline__ SoftmaxCE describe(const int64_t* targets) const {
    SoftmaxCE ce;
    ce.dtype = ScalarType::Float;
    ce.n = b_.n;
    ce.classes = b_.layer[b_.layers - 1].out;
    ce.label_smoothing = b_.label_smoothing;
    ce.input = memory_ + b_.logits;
    ce.grad_input = memory_ + b_.logits;
    ce.target = targets;
    ce.total = total_;
    return ce;
  }

  // h = f(W input + b); the last layer writes logits. along: whether the input is [n][in].
  template <bool along>
  __device__ __forceinline__ void forward(const BlockLayer& layer, const Factor& input, bool last) const {
    const Factor weight{memory_ + layer.weight.at, layer.ld, layer.out};
    for (int tile = warp_; tile < warp_tiles(layer.out, b_.n); tile += warps_) {
      const Place place(tile, layer.out, b_.n);
      if (!place.here) continue;
      float z[kTile][kTile];
      product<true, along>(weight, input, layer.in, place, z);
      if (layer.bias.data) {
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          const float bias = memory_[layer.bias.at + min(row_of<true>(place.row, i, layer.out), layer.out - 1)];
#pragma unroll
          for (int j = 0; j < kTile; ++j) z[i][j] += bias;
        }
      }
      if (last) {
#pragma unroll
        for (int i = 0; i < kTile; ++i)
#pragma unroll
          for (int j = 0; j < kTile; ++j) {
            const int o = row_of<true>(place.row, i, layer.out), example = row_of<along>(place.column, j, b_.n);
            if (o < layer.out && example < b_.n) memory_[b_.logits + example * layer.out + o] = z[i][j];
          }
        continue;
      }
      if (b_.saves_x) store_tile<along>(layer.z, layer.out, place, z);
      with_forward(b_.forward, [&](auto f) {
#pragma unroll
        for (int i = 0; i < kTile; ++i)
#pragma unroll
          for (int j = 0; j < kTile; ++j) {
            const float in[] = {z[i][j]};
            float out[1];
            f.apply(in, out, b_.parameter);
            z[i][j] = out[0];
          }
      });
      store_tile<along>(layer.h, layer.out, place, z);
    }
  }

  // Writes a tile of activations, and 0 for examples that are not there.
  template <bool along>
  __device__ __forceinline__ void store_tile(int at, int rows, const Place& place,
                                             const float (&tile)[kTile][kTile]) const {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const int row = row_of<true>(place.row, i, rows);
      if (row < rows) store_row<along>(memory_ + at + row * b_.columns, place.column, tile[i]);
    }
  }
  template <bool along>
  __device__ __forceinline__ void store_row(float* row, int strip, const float (&values)[kTile]) const {
    Pack<float> pack;
#pragma unroll
    for (int j = 0; j < kTile; ++j) pack.value[j] = row_of<along>(strip, j, b_.n) < b_.n ? values[j] : 0.0f;
    if constexpr (along) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) row[row_of<along>(strip, j, b_.n)] = pack.value[j];
    } else {
      *reinterpret_cast<Pack<float>*>(row + strip * kTile) = pack;
    }
  }

  // What each row loses, and the gradient of the logits, a warp to a row. A class index out of range gives nan, and its
  // row no gradient: nobody waits here to raise.
  __device__ __forceinline__ void softmax_ce(float* logits) const {
    const SoftmaxCE ce = describe(targets_);
    for (int i = warp_; i < b_.n; i += warps_) {
      const Row<float> row(ce, i);
      float shift, sum, lost = 0;
      softmax(group_, row.x, ce.classes, shift, sum);
      if (!row.ignored() && row.in_range())
        lost = row.loss(group_, shift, log(sum));
      else if (!row.ignored())
        lost = std::numeric_limits<float>::quiet_NaN();
      if (group_.rank == 0) memory_[b_.row_loss + i] = lost;
      float* const own = memory_ + b_.logits + i * ce.classes;
      if (logits)
        for (int64_t c = group_.rank; c < ce.classes; c += group_.size) logits[i * ce.classes + c] = own[c];
      __syncwarp();  // what is written now has been read
      row.backward(group_, row.upstream(), shift, sum, own);
      for (int64_t c = group_.rank; c < ce.classes; c += group_.size)
        memory_[b_.gradient + c * b_.columns + i] = own[c];
    }
  }

  // The gradient of what layer l computes before its activation.
  __device__ __forceinline__ Factor gradient_of(int l) const {
    return activations(l + 1 == b_.layers ? b_.gradient : b_.layer[l].h, b_.layer[l].out);
  }

  // The layers below want the gradient of z, of which h = f(z) is this one's input, through the weight as it is before
  // the update. It takes the place of h, which the gradient of the weight is made from: so both are made first, by
  // threads that have a tile of each at most, and written after that.
  __device__ __forceinline__ void backward(int l) const {
    const BlockLayer &layer = b_.layer[l], &below = b_.layer[l - 1];
    const Factor dz = gradient_of(l);
    float dw[kTile][kTile], below_dz[kTile][kTile], db = 0;
    const Place of_weight(warp_, layer.out, layer.in);
    const bool has_weight = layer.weight.rule >= 0 && of_weight.here;
    if (has_weight) product<true, true>(dz, activations(below.h, layer.in), b_.n, of_weight, dw);
    const Place of_below(warps_ - 1 - warp_, layer.in, b_.n);  // from the last warp on: the weight's begin at the first
    if (of_below.here) gradient_below(layer, below, dz, of_below, below_dz);
    const int of_bias = blockDim.x - 1 - threadIdx.x;
    const bool has_bias = layer.bias.rule >= 0 && of_bias < layer.out;
    if (has_bias) db = sum_of_row(dz, of_bias);
    __syncthreads();
    if (of_below.here) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const int row = row_of<false>(of_below.row, i, layer.in);
        if (row < layer.in) store_row<false>(memory_ + below.h + row * b_.columns, of_below.column, below_dz[i]);
      }
    }
    if (has_weight) update_tile<true>(layer.weight, layer.ld, layer.out, layer.in, of_weight, dw);
    if (has_bias) update_bias(layer, of_bias, db);
    __syncthreads();
  }

  // A tile of it. Of all products this one alone has no registers for its sums under nvcc 13 (64 for each of 1024
  // threads; 72 for 896 were no help): 16 loads and stores of local memory in every turn of its loop. Tried in vain: the
  // activation's gradient after the barrier, the two products in the other order, one number of the sum at a time.
  __device__ __forceinline__ void gradient_below(const BlockLayer& layer, const BlockLayer& below, const Factor& dz,
                                                 const Place& place, float (&result)[kTile][kTile]) const {
    float dh[kTile][kTile];
    product<false, false>({memory_ + layer.weight.at, layer.ld, layer.in}, {dz.data, dz.ld, b_.n}, layer.out, place,
                          dh);
    const float* const saved = memory_ + (b_.saves_x ? below.z : below.h) + place.column * kTile;
    with_backward(b_.backward, [&](auto f) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const auto pack =
            *reinterpret_cast<const Pack<float>*>(saved + row_of<false>(place.row, i, layer.in) * b_.columns);
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
          const float in[] = {dh[i][j], pack.value[j]};
          float out[1];
          f.apply(in, out, b_.parameter);
          result[i][j] = out[0];
        }
      }
    });
  }

  // Below the lowest layer nothing is wanted: its parameters are updated as their gradients come.
  __device__ __forceinline__ void update_lowest() const {
    const BlockLayer& layer = b_.layer[b_.lowest];
    const Factor dz = gradient_of(b_.lowest);
    if (layer.weight.rule >= 0) {
      if (b_.lowest == 0)
        update_weight<false>(layer, dz, {memory_ + b_.x, b_.x_ld, layer.in});
      else
        update_weight<true>(layer, dz, activations(b_.layer[b_.lowest - 1].h, layer.in));
    }
    if (layer.bias.rule >= 0)
      for (int o = blockDim.x - 1 - threadIdx.x; o < layer.out; o += blockDim.x)
        update_bias(layer, o, sum_of_row(dz, o));
  }
  template <bool along>
  __device__ __forceinline__ void update_weight(const BlockLayer& layer, const Factor& dz, const Factor& input) const {
    for (int tile = warp_; tile < warp_tiles(layer.out, layer.in); tile += warps_) {
      const Place place(tile, layer.out, layer.in);
      if (!place.here) continue;
      float dw[kTile][kTile];
      product<true, along>(dz, input, b_.n, place, dw);
      update_tile<along>(layer.weight, layer.ld, layer.out, layer.in, place, dw);
    }
  }

  __device__ __forceinline__ float sum_of_row(const Factor& dz, int row) const {
    float sum[kTile] = {};
    for (int k = 0; k < b_.n; k += kTile) {
      const auto pack = *reinterpret_cast<const Pack<float>*>(dz.data + row * dz.ld + k);
#pragma unroll
      for (int j = 0; j < kTile; ++j) sum[j] += pack.value[j];
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // Where the optimizer's state is, and the numbers from row to row there; null: there is none.
  __device__ __forceinline__ float* state_of(const Kept& kept, int s) const {
    return kept.state_at[s] >= 0 ? memory_ + kept.state_at[s] : kept.state[s];
  }

  template <bool along>
  __device__ __forceinline__ void update_tile(const Kept& kept, int ld, int rows, int columns, const Place& place,
                                              const float (&gradient)[kTile][kTile]) const {
    float* const state[2] = {state_of(kept, 0), state_of(kept, 1)};
    const int state_ld = kept.state_at[0] >= 0 ? ld : columns;
    rules_[kept.rule].visit([&](const auto& rule) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const int row = row_of<true>(place.row, i, rows);
        if (row >= rows) continue;
        float* const values = memory_ + kept.at + row * ld;
        // All that a rule reads first: a store between them would keep the next from being read.
        float value[kTile], kept_state[2][kTile];
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
          const int column = row_of<along>(place.column, j, columns);
          if (column >= columns) continue;
          value[j] = values[column];
#pragma unroll
          for (int s = 0; s < 2; ++s)
            if (state[s]) kept_state[s][j] = state[s][row * state_ld + column];
        }
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
          const int column = row_of<along>(place.column, j, columns);
          if (column >= columns) continue;
          rule(value, gradient[i], kept_state[0], kept_state[1], j);
          values[column] = value[j];
#pragma unroll
          for (int s = 0; s < 2; ++s)
            if (state[s]) state[s][row * state_ld + column] = kept_state[s][j];
        }
      }
    });
  }

  __device__ __forceinline__ void update_bias(const BlockLayer& layer, int o, float gradient) const {
    float* const value = memory_ + layer.bias.at;
    float* const state[2] = {state_of(layer.bias, 0), state_of(layer.bias, 1)};
    rules_[layer.bias.rule].visit([&](const auto& rule) {
      rule(value + o, &gradient, state[0] ? state[0] + o : nullptr, state[1] ? state[1] + o : nullptr, 0);
    });
  }

  const Block& b_;
  float* const memory_;
  const int warp_, warps_;
  float* const total_;
  int64_t* const targets_;
  AnyRule* const rules_;
  const Group<32> group_;
};

// rules: `rule_count` of each step in turn, or null: those of `same` in all of them.
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    train(const __grid_constant__ Block block, const __grid_constant__ Rules same, const AnyRule* rules,
          const float* xs, const int64_t* targets, int64_t steps, float* losses, float* logits) {
  const Network network(block);
  network.load();
  const int64_t in = block.layer[0].in;
  for (int64_t s = 0; s < steps; ++s)
    network.step(xs + s * block.n * in, targets + s * block.n, rules ? rules + s * block.rule_count : same.rule,
                 losses + s, s + 1 == steps ? logits : nullptr);
  network.store();
}

__global__ void store_rules(const __grid_constant__ Rules rules, int count, AnyRule* to) {
  if (static_cast<int>(threadIdx.x) < count) to[threadIdx.x] = rules.rule[threadIdx.x];
}

// ---- the trainer -------------------------------------------------------------------------------------------------

class Trainer : public TrainerBase {
public:
  Trainer(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const std::vector<Tensor>& state,
          const std::string& activation, double parameter, double label_smoothing, const std::string& rule,
          const std::vector<int64_t>& groups, const std::vector<int64_t>& slots)
      : TrainerBase(weights, biases, state, activation, label_smoothing, rule, groups, slots),
        rules_(empty({static_cast<int64_t>(updated_.size() * sizeof(AnyRule))}, ScalarType::Byte, first_)) {
    block_.forward = activation_.forward;
    block_.backward = activation_.backward;
    block_.saves_x = activation_.saves_x;
    block_.parameter = static_cast<float>(parameter);
    block_.label_smoothing = label_smoothing;
    const Launch launch(kTrainer, device_.index());
    launch.check(cudaDeviceGetAttribute(&most_shared_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_.index()));
  }

  // Whether steps on n examples can be done in one block.
  bool fits(int64_t n) {
    if (n != laid_out_for_) fits_ = lay_out(n);
    laid_out_for_ = n;
    return fits_;
  }

  Tensor steps(const Tensor& xs_, const Tensor& targets_, const std::vector<double>& hyper) {
    const auto [xs, targets, many, count, n] = check_batches(xs_, targets_);
    const bool each = check_hyper(hyper, count);
    STD_TORCH_CHECK(fits(n), "torchbp::", kTrainer, ": the network and ", n,
                    " examples want more than one block of "
                    "threads: ask fits");
    const Tensor losses = empty(many ? std::vector<int64_t>{count} : std::vector<int64_t>{}, ScalarType::Float, xs);
    if (count == 0) return losses;
    const Launch launch(kTrainer, device_.index());
    check_not_capturing(launch);
    locate();
    for (const Trained& t : trained_) {
      Kept& kept = of(t);
      kept.data = t.data;
      for (int s = 0; s < 2; ++s)
        kept.state[s] = t.group < 0 ? nullptr : static_cast<float*>(updated_[t.index].state[s]);
    }
    Rules same;
    std::vector<AnyRule> rules;
    Tensor of_steps;
    const bool differ = count > 1 && (each || rule_ == Rule::adamw);
    for (int64_t s = 0; s < (differ ? count : 1); ++s) {
      begin_step(rows_of_step(hyper, each, s));
      for (size_t k = 0; k < updated_.size(); ++k)
        if (differ)
          rules.emplace_back(updated_[k].update);
        else
          same.rule[k] = AnyRule(updated_[k].update);
    }
    if (!rules.empty()) {
      const auto bytes = rules.size() * sizeof(AnyRule);
      of_steps = empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, first_);
      // From memory that is not pinned: it has been read when this returns.
      launch.check(
          cudaMemcpyAsync(of_steps.mutable_data_ptr(), rules.data(), bytes, cudaMemcpyHostToDevice, launch.stream()));
    }
    const std::vector<int64_t> shape{n, sizes_.back().out};
    if (!logits_ || !has_shape(*logits_, shape)) logits_ = empty(shape, ScalarType::Float, first_);
    launch.with_shared(static_cast<size_t>(block_.floats) * sizeof(float), train, 1, 32 * static_cast<unsigned>(warps_),
                       block_, same, rules.empty() ? nullptr : static_cast<const AnyRule*>(of_steps.const_data_ptr()),
                       floats_of(xs), static_cast<const int64_t*>(targets.const_data_ptr()), count, floats_of(losses),
                       floats_of(*logits_));
    return losses;
  }

  // A step that runs elsewhere begins: what update() does in it, now or in a graph that has recorded it. Returns a number
  // that is another one once parameters or state are in other places, and such a graph is of no use any more.
  int64_t begin(const std::vector<double>& hyper) {
    check_hyper(hyper, 1);
    const Launch launch(kTrainer, device_.index());
    check_not_capturing(launch);
    locate();
    std::vector<const void*> places;
    for (const Trained& t : trained_) places.push_back(t.data);
    for (const Parameter& p : updated_) places.insert(places.end(), {p.state[0], p.state[1]});
    if (places != places_) ++version_;
    places_ = std::move(places);
    begin_step(rows_of_step(hyper, false, 0));
    auto* const to = static_cast<AnyRule*>(rules_.mutable_data_ptr());
    for (size_t k = 0; k < updated_.size(); k += kMostRules) {
      Rules rules;
      const size_t count = std::min<size_t>(updated_.size() - k, kMostRules);
      for (size_t i = 0; i < count; ++i) rules.rule[i] = AnyRule(updated_[k + i].update);
      launch(store_rules, 1, 32, rules, static_cast<int>(count), to + k);
    }
    return version_;
  }

  // Updates what is trained from its gradients, in the order of open's parameters, as begin() has said.
  void update(const std::vector<Tensor>& grads) {
    STD_TORCH_CHECK(grads.size() == updated_.size(), "torchbp::", kTrainer, ": grads wants ", updated_.size(),
                    " tensors, got ", grads.size());
    locate();
    for (const Trained& t : trained_) {
      if (t.group < 0) continue;
      const Tensor& grad = grads[t.index];
      check_operand("grads", grad, ScalarType::Float);
      STD_TORCH_CHECK(same_shape(grad, t.value), "torchbp::", kTrainer, ": grads wants tensors like the parameters");
      updated_[t.index].grad = grad.const_data_ptr();
    }
    update_by(kTrainer, updated_, static_cast<const AnyRule*>(rules_.const_data_ptr()));
  }

  // Of the last of some steps in one block, before its update.
  Tensor logits() const {
    STD_TORCH_CHECK(logits_, "torchbp::", kTrainer, ": there are no logits before the first step");
    return torch::stable::clone(*logits_);
  }

private:
  static void check_not_capturing(const Launch& launch) {
    STD_TORCH_CHECK(!launch.capturing(), "torchbp::", kTrainer,
                    ": a CUDA graph would do the same step again and again: run the step outside of it");
  }

  Kept& of(const Trained& t) {
    BlockLayer& layer = block_.layer[t.layer];
    return t.is_weight ? layer.weight : layer.bias;
  }

  // Lays out the block's memory; whether there is enough, and threads enough for a tile each where that is needed.
  bool lay_out(int64_t n) {
    const size_t layers = sizes_.size();
    constexpr int64_t most = 1 << 16;  // of any size: beyond it no product of two is in an int
    if (layers > kMostLayers || n > most) return false;
    for (const Size& size : sizes_)
      if (size.in < 1 || size.out < 1 || size.in > most || size.out > most) return false;
    Block& b = block_;
    b.layers = b.lowest = static_cast<int>(layers);
    b.n = static_cast<int>(n);
    b.columns = spread(b.n);
    b.rule_count = static_cast<int>(updated_.size());
    for (size_t l = 0; l < layers; ++l) {
      BlockLayer& layer = b.layer[l];
      layer = {};
      layer.in = static_cast<int>(sizes_[l].in);
      layer.out = static_cast<int>(sizes_[l].out);
      layer.ld = spread(layer.in);
    }
    for (const Trained& t : trained_) {
      of(t).rule = t.group < 0 ? -1 : static_cast<int>(t.index);
      if (t.group >= 0) b.lowest = std::min(b.lowest, static_cast<int>(t.layer));
    }

    int64_t used = 0;
    const int64_t room = most_shared_ / static_cast<int64_t>(sizeof(float));
    const auto take = [&](int64_t rows, int64_t ld) {
      const int64_t at = used;
      used += (rows * ld + kTile - 1) / kTile * kTile;
      return static_cast<int>(std::min(at, room));
    };
    const auto take_for = [&](const Trained& t) {
      const BlockLayer& layer = b.layer[t.layer];
      return t.is_weight ? take(round_up(layer.out), layer.ld) : take(1, layer.out);
    };
    const int classes = b.layer[layers - 1].out;
    b.x_ld = b.layer[0].ld;
    b.x = take(round_up(b.n), b.x_ld);
    b.targets = take(b.n, sizeof(int64_t) / sizeof(float));
    b.row_loss = take(1, b.n);
    b.total = take(1, 1);
    b.rules = take(b.rule_count, sizeof(AnyRule) / sizeof(float));
    b.logits = take(b.n, classes);
    b.gradient = take(round_up(classes), b.columns);
    for (size_t l = 0; l + 1 < layers; ++l) {
      b.layer[l].h = take(round_up(b.layer[l].out), b.columns);
      if (b.saves_x) b.layer[l].z = take(round_up(b.layer[l].out), b.columns);
    }
    for (const Trained& t : trained_) of(t).at = take_for(t);
    if (used > room) return false;
    b.floats = static_cast<int>(used);

    // State too, if there is room for all of it.
    for (const Trained& t : trained_)
      for (size_t s = 0; s < std::min<size_t>(t.state.size(), 2); ++s) of(t).state_at[s] = take_for(t);
    if (used <= room)
      b.floats = static_cast<int>(used);
    else
      for (const Trained& t : trained_) of(t).state_at[0] = of(t).state_at[1] = -1;

    warps_ = kFewestWarps;
    for (int l = 0; l < b.layers; ++l) {
      const BlockLayer& layer = b.layer[l];
      const int of_h = warp_tiles(layer.in, b.n), of_weight = warp_tiles(layer.out, layer.in);
      if (l > b.lowest && std::max(of_h, of_weight) > kMostWarps) return false;
      warps_ =
          std::max({warps_, warp_tiles(layer.out, b.n), of_weight, l > b.lowest ? of_h : 0, strips(layer.out) / 8});
    }
    warps_ = std::min(warps_, kMostWarps);
    return true;
  }

  int most_shared_ = 0, warps_ = 0;
  Block block_;
  int64_t laid_out_for_ = -1;
  bool fits_ = false;
  std::optional<Tensor> logits_;

  Tensor rules_;  // what update() follows
  std::vector<const void*> places_;
  int64_t version_ = 0;
};

// Numbers that no trainer of the CPU gets: there it would be taken for another one.
Handles<Trainer> trainers(kTrainer, int64_t(1) << 40);

int64_t open(std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> state, Text activation,
             double parameter, double label_smoothing, Text rule, std::vector<int64_t> groups,
             std::vector<int64_t> slots) {
  return trainers.open(
      std::make_shared<Trainer>(weights, biases, state, activation, parameter, label_smoothing, rule, groups, slots));
}

Tensor steps(int64_t number, const Tensor& xs, const Tensor& targets, std::vector<double> hyper) {
  return trainers.at(number)->steps(xs, targets, hyper);
}

bool fits(int64_t number, int64_t n, const Tensor&) { return trainers.at(number)->fits(n); }

int64_t begin_step(int64_t number, std::vector<double> hyper, const Tensor&) {
  return trainers.at(number)->begin(hyper);
}

void update(int64_t number, std::vector<Tensor> grads) { trainers.at(number)->update(grads); }

Tensor logits(int64_t number, const Tensor&) { return trainers.at(number)->logits(); }

void close(int64_t number, const Tensor&) { trainers.close(number); }

}  // namespace
}  // namespace cuda
}  // namespace torchbp

STABLE_TORCH_LIBRARY_IMPL(torchbp_trainer, CUDA, m) {
  m.impl("open", TORCH_BOX(&torchbp::cuda::open));
  m.impl("steps", TORCH_BOX(&torchbp::cuda::steps));
  m.impl("again", TORCH_BOX(&torchbp::again<&torchbp::cuda::steps>));
  m.impl("fits", TORCH_BOX(&torchbp::cuda::fits));
  m.impl("begin_step", TORCH_BOX(&torchbp::cuda::begin_step));
  m.impl("update", TORCH_BOX(&torchbp::cuda::update));
  m.impl("logits", TORCH_BOX(&torchbp::cuda::logits));
  m.impl("close", TORCH_BOX(&torchbp::cuda::close));
}
