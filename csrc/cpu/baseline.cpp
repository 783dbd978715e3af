// The CPU kernels for any machine: what the compiler's default target has (SSE2 on x86-64).
#include "system.h"

#define TORCHBP_LEVEL baseline
#define TORCHBP_VECTOR 16
#include "level.h"

const torchbp::Level& torchbp::baseline_level() {
  static const Level level = baseline::make_level("baseline");
  return level;
}
