// The parts and the memory of gemm.h's products.
#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>

#include "threads.h"

namespace torchbp {

float* Scratch::at_least(size_t numbers) {
  if (numbers > capacity) {
    std::free(data);
    capacity = (numbers + 1023) / 1024 * 1024;
    data = static_cast<float*>(std::aligned_alloc(64, capacity * sizeof(float)));
    if (!data) {
      capacity = 0;
      throw std::bad_alloc();
    }
  }
  return data;
}

Scratch::~Scratch() { std::free(data); }

namespace {

// Below this many multiplications a second thread costs more than it saves; the latter in a team.
constexpr double kSerial = 1 << 20, kSerialInTeam = 1 << 17;

// Up to this many numbers, a parameter stays in L1 beside its gradient and what the optimizer keeps for it.
constexpr int64_t kSmall = 2048;

thread_local Scratch of_thread, of_gradient;

// Rows that lie across cache lines are dear to update one after the other: all at once, when the gradient is there, they
// are one run. 1.1 times as fast at 40 x 40.
bool updates_in_one_run(const Gemm& g) {
  return g.update && g.m * g.n <= kSmall && g.n % 16 != 0 && g.c_i == g.n && g.c_j == 1 &&
         !level().gemm[g.dtype].updates_in_place(g);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// C in parts, one for each thread.
struct Grid {
  int64_t down = 1, across = 1;
};

// The grid, as even as can be to a sixteenth, in which threads read least of what others read too, or have written: such
// memory is copied more than once, and may come from another core's cache. A product of weights with few examples is
// divided by rows of the weights, and so is their gradient, for the same reason: what a thread has updated, it reads. For
// 3072 x 512 weights at batch 128 a step takes 0.94 of the time of one whose gradient is divided by columns on two cores
// with a cache in common, and 0.71 on two without.
Grid grid_of(const Gemm& g, const GemmKernels& kernels, int64_t panels, int64_t threads) {
  const auto grid = [&](int64_t down) { return Grid{std::min(down, g.m), std::min(threads / down, panels)}; };
  // Rows that the largest part multiplies; to begin and end a tile takes as long as two more.
  const auto work = [&](const Grid& of) {
    const int64_t rows = ceil_div(g.m, of.down);
    return (rows + 2 * ceil_div(rows, kernels.rows)) * ceil_div(panels, of.across);
  };
  const auto shared = [&](const Grid& of) {
    const double m = static_cast<double>(g.m), n = static_cast<double>(g.n), k = static_cast<double>(g.k);
    return static_cast<double>(of.down - 1) * n * k +
           static_cast<double>(of.across - 1) * m * (g.of_parameter ? k + n : k);
  };
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t d = 1; d <= threads; ++d) least = std::min(least, work(grid(d)));
  Grid best;
  double fewest = std::numeric_limits<double>::infinity();
  for (int64_t d = 1; d <= threads; ++d) {
    const Grid of = grid(d);
    if (work(of) > least + least / 16 || shared(of) >= fewest) continue;
    best = of;
    fewest = shared(of);
  }
  return best;
}

}  // namespace

void gemm(const Gemm& g) {
  if (g.m <= 0 || g.n <= 0) return;
  if (updates_in_one_run(g)) {
    Gemm gradient = g;
    gradient.c = of_gradient.at_least(static_cast<size_t>(g.m * g.n));
    gradient.update = nullptr;
    gemm(gradient);
    return level().update[kFloat32](*g.update, g.c, gradient.c, g.state0, g.state1, g.m * g.n);
  }
  const GemmKernels& kernels = level().gemm[g.dtype];
  const double work =
      static_cast<double>(g.m) * static_cast<double>(g.n) * static_cast<double>(std::max<int64_t>(g.k, 1));
  const int64_t panels = ceil_div(g.n, kernels.columns);
  const int64_t threads = work < (leads_team() ? kSerialInTeam : kSerial) ? 1 : thread_count();
  if (threads == 1) return kernels.run(g, 0, g.m, 0, panels, of_thread);
  const auto [down, across] = grid_of(g, kernels, panels, threads);
  for_parts(down * across, [&, down = down, across = across](int64_t part) {
    const int64_t d = part % down, a = part / down;
    Gemm own = g;
    own.b = static_cast<const char*>(g.b) + part % g.b_copies * g.b_apart;
    kernels.run(own, g.m * d / down, g.m * (d + 1) / down, panels * a / across, panels * (a + 1) / across, of_thread);
  });
}

}  // namespace torchbp
