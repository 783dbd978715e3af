// The chain of products of network.h.
#include "network.h"

#include <algorithm>

namespace torchbp {
namespace {

// Up to this many examples it pays to read a weight with fewer numbers row by row; a larger one up to kFewestRows.
constexpr int64_t kFewest = 8, kSmallWeight = 1 << 16;

Matrix weight_of(const Layer& layer) { return {const_cast<float*>(layer.weight), layer.in, 1}; }

// Feature-major memory as [n, features].
Matrix by_example(float* data, int64_t n) { return {data, 1, n}; }

}  // namespace

void Network::set_activation(const Activation& f, double value) {
  activation = float_column(f.forward);
  gradient = float_column(f.backward);
  saves_x = f.saves_x;
  parameter = value;
}

void forward(const Network& net, Matrix x, Matrix y) {
  Matrix h = x;
  for (size_t l = 0; l < net.layers.size(); ++l) {
    const Layer& layer = net.layers[l];
    const bool last = l + 1 == net.layers.size();
    const Matrix to = last ? y : by_example(layer.h, net.n);
    Gemm g = product(layer.out, net.n, layer.in, weight_of(layer), h.transposed(), to.transposed());
    g.bias = layer.bias;
    g.bias_of_row = true;
    if (!last) {
      g.activation = net.activation;
      g.parameter = net.parameter;
      g.z = net.saves_x ? layer.z : nullptr;
    }
    gemm(g);
    h = to;
  }
}

int64_t scratch_size(const Network& net) {
  int64_t widest = 0;
  for (const Layer& layer : net.layers) widest = std::max(widest, layer.out);
  return 2 * widest * net.n;
}

void sum_rows(Matrix dz, int64_t n, int64_t out, void* db) {
  level().sum_rows[dz.dtype](dz.data, dz.row, dz.column, n, out, db);
}

void backward(const Network& net, Matrix x, Matrix dy, const std::vector<Gradients>& gradients, Matrix dx,
              float* scratch) {
  float* const other = scratch + scratch_size(net) / 2;
  // The first layer whose gradients anybody wants.
  size_t first = 0;
  while (first < net.layers.size() && !gradients[first].weight && !gradients[first].bias) ++first;
  if (dx.data) first = 0;
  Matrix dz = dy;
  for (size_t l = net.layers.size(); l-- > first;) {
    const Layer& layer = net.layers[l];
    const Gradients& wanted = gradients[l];
    // dL/dh, through f to dL/dz of the layer below, before an update changes the weight.
    Matrix below;
    if (l > first || dx.data) {
      if (l > 0) below = by_example(dz.data == scratch ? other : scratch, net.n);
      const Matrix to = l > 0 ? below : dx, weight = weight_of(layer);
      // Few examples read the weight row by row, and gradients of features are read by the next product as they lie.
      Gemm g = l == 0 || net.n <= (layer.in * layer.out < kSmallWeight ? kFewest : kFewestRows)
                   ? product(net.n, layer.in, layer.out, dz, weight, to)
                   : product(layer.in, net.n, layer.out, weight.transposed(), dz.transposed(), to.transposed());
      if (l > 0) {
        g.gradient = net.gradient;
        g.parameter = net.parameter;
        g.saved = net.saves_x ? net.layers[l - 1].z : net.layers[l - 1].h;
      }
      gemm(g);
    }
    if (wanted.weight) {
      const Matrix h = l > 0 ? by_example(net.layers[l - 1].h, net.n) : x;
      Gemm g = product(layer.out, layer.in, net.n, dz.transposed(), h, {wanted.weight, layer.in, 1});
      g.of_parameter = true;
      g.update = wanted.update_weight;
      g.state0 = wanted.state_weight[0];
      g.state1 = wanted.state_weight[1];
      gemm(g);
    }
    if (wanted.bias) {
      if (wanted.update_bias) {
        thread_local Scratch sums;
        float* const db = sums.at_least(static_cast<size_t>(layer.out));
        sum_rows(dz, net.n, layer.out, db);
        level().update[kFloat32](*wanted.update_bias, wanted.bias, db, wanted.state_bias[0], wanted.state_bias[1],
                                 layer.out);
      } else {
        sum_rows(dz, net.n, layer.out, wanted.bias);
      }
    }
    dz = below;
  }
}

}  // namespace torchbp
