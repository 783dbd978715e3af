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
constexpr int64_t kPackedNumbers = 2 << 20;  // of B that are packed together: 8 MiB

thread_local Scratch packed_panels, of_thread;

}  // namespace

void gemm(const Gemm& g) {
  if (g.m <= 0 || g.n <= 0) return;
  const GemmKernels& kernels = level().gemm;
  const double work =
      static_cast<double>(g.m) * static_cast<double>(g.n) * static_cast<double>(std::max<int64_t>(g.k, 1));
  const int64_t threads = work < (leads_team() ? kSerialInTeam : kSerial) ? 1 : thread_count();
  const bool in_place = kernels.in_place(g);
  int64_t columns = g.n;
  if (!in_place && g.k > 0) {
    columns = std::max<int64_t>(1, kPackedNumbers / g.k / kernels.columns) * kernels.columns;
    columns = std::min(columns, g.n);
  }
  for (int64_t j = 0; j < g.n; j += columns) {
    const int64_t n = std::min(columns, g.n - j), panels = (n + kernels.columns - 1) / kernels.columns;
    float* packed = nullptr;
    if (!in_place) {
      packed = packed_panels.at_least(static_cast<size_t>(panels * kernels.columns * std::max<int64_t>(g.k, 1)));
      const int64_t parts = std::min(threads, panels);
      for_parts(parts, [&](int64_t part) {
        kernels.pack(g, j, n, panels * part / parts, panels * (part + 1) / parts, packed);
      });
    }
    // A grid of threads over C whose largest part is as small as can be.
    int64_t down = 1, across = 1, least = g.m * panels;
    for (int64_t d = 1; d <= threads; ++d) {
      const int64_t a = threads / d;
      const int64_t rows = (g.m + d - 1) / d;
      const int64_t part = (rows + kernels.rows - 1) / kernels.rows * kernels.rows * ((panels + a - 1) / a);
      if (part <= least) least = part, down = d, across = a;
    }
    for_parts(down * across, [&](int64_t part) {
      const int64_t d = part % down, a = part / down;
      kernels.run(g, j, n, g.m * d / down, g.m * (d + 1) / down, panels * a / across, panels * (a + 1) / across, packed,
                  of_thread);
    });
  }
}

}  // namespace torchbp
