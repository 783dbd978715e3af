// A multi-layer perceptron on plain float32 memory: all layers forward, all layers backward, and nothing between them
// but gemm.h with the activation, its gradient or the optimizer's update done on each tile.
//
// Hidden activations are kept feature-major, [features][n]: then the batch is what vectors run along in every product,
// weights are never transposed, and a layer's output is the next one's input as it stands. The two operations of the
// network that autograd records (ops.h: mlp, mlp_backward) and the training step (train.cpp) run on it.
#pragma once

#include <vector>

#include "../activation.h"
#include "gemm.h"

namespace torchbp {

// One layer: z = W h + b, and h' = f(z) unless it is the last.
struct Layer {
  int64_t in = 0, out = 0;
  const float* weight = nullptr;  // [out][in]
  const float* bias = nullptr;    // [out], or null
  // What forward writes and backward reads, [out][n]. z only where the gradient of f reads it; neither in the last.
  float *h = nullptr, *z = nullptr;
};

// What becomes of a layer's gradients: written where a pointer says so, or used at once to update the parameter.
struct Gradients {
  float *weight = nullptr, *bias = nullptr;  // the gradient, or the parameter itself where there is an update
  const Update* update_weight = nullptr;
  const Update* update_bias = nullptr;
  float* state_weight[2] = {nullptr, nullptr};
  float* state_bias[2] = {nullptr, nullptr};
};

struct Network {
  int64_t n = 0;  // examples
  std::vector<Layer> layers;
  ColumnFunction activation = nullptr, gradient = nullptr;  // null: none
  bool saves_x = false;                                     // whether the gradient reads z
  double parameter = 0;                                     // of the activation

  // f between the layers.
  void set_activation(const Activation& f, double parameter);
};

// y [n, out] of x [n, in].
void forward(const Network& network, Matrix x, Matrix y);

// The gradients from dy [n, out]; dx [n, in] too where its data is not null. scratch: two matrices [widest][n].
void backward(const Network& network, Matrix x, Matrix dy, const std::vector<Gradients>& gradients, Matrix dx,
              float* scratch);

// Numbers that backward's scratch holds.
int64_t scratch_size(const Network& network);

// db [out] = sum of dz [n, out] over its rows.
void sum_rows(Matrix dz, int64_t n, int64_t out, void* db);

}  // namespace torchbp
