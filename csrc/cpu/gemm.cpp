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

thread_local Scratch of_thread;

}  // namespace

void gemm(const Gemm& g) {
  if (g.m <= 0 || g.n <= 0) return;
  const GemmKernels& kernels = level().gemm;
  const double work =
      static_cast<double>(g.m) * static_cast<double>(g.n) * static_cast<double>(std::max<int64_t>(g.k, 1));
  const int64_t threads = work < (leads_team() ? kSerialInTeam : kSerial) ? 1 : thread_count();
  // A grid of threads over C whose largest part is as small as can be; of equal ones, that with the most panels side by
  // side, as each thread copies the panels that it reads.
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t panels = ceil_div(g.n, kernels.columns);
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
