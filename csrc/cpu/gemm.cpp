// The parts and the memory of gemm.h's products.
#include "gemm.h"

#include <algorithm>
#include <cstdlib>
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
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t panels = ceil_div(g.n, kernels.columns);
  const int64_t threads = work < (leads_team() ? kSerialInTeam : kSerial) ? 1 : thread_count();
  if (threads == 1) return kernels.run(g, 0, g.m, 0, panels, of_thread);
  // A grid of threads over C whose largest part is as small as can be; of equal ones, that with the most panels side by
  // side, as each thread copies the panels that it reads.
  int64_t down = 1, across = 1, least = ceil_div(g.m, kernels.rows) * panels;
  for (int64_t d = 1; d <= threads; ++d) {
    const int64_t a = threads / d;
    const int64_t part = ceil_div(ceil_div(g.m, d), kernels.rows) * ceil_div(panels, a);  // tiles
    if (part < least) least = part, down = d, across = a;
  }
  for_parts(down * across, [&](int64_t part) {
    const int64_t d = part % down, a = part / down;
    kernels.run(g, g.m * d / down, g.m * (d + 1) / down, panels * a / across, panels * (a + 1) / across, of_thread);
  });
}

}  // namespace torchbp
