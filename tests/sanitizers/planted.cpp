// A bug of each kind, for the sanitizer builds alone (setup.py, TORCHBP_SANITIZE) to find: that they do shows that a
// clean run of the tests means something. Each stands where a real one would: in a kernel's loop over a tensor's memory,
// in arithmetic with sizes, in work shared out by csrc/cpu/threads.h.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../../csrc/check.h"
#include "../../csrc/cpu/threads.h"

namespace torchbp {
namespace {

// The sum of a contiguous float32 tensor and of the number behind its last.
double past_the_end(const Tensor& x) {
  const float* const data = floats_of(x);
  double sum = 0;
  for (int64_t i = 0; i <= x.numel(); ++i) sum += data[i];
  return sum;
}

// A float32 read where none can begin.
double misaligned(const Tensor& x) {
  const float* const data = reinterpret_cast<const float*>(reinterpret_cast<const char*>(floats_of(x)) + 1);
  return *data;
}

// n * n, as an index into a matrix is worked out.
int64_t overflow(int64_t n) { return n * n; }

// Counts in one number, without an atomic, from the parts that threads work on: `team` in a team, else in PyTorch's.
int64_t race(int64_t n, bool team) {
  int64_t count = 0;
  const auto work = [&] { for_parts(n, [&](int64_t) { ++count; }); };
  if (team)
    on_team(work);
  else
    work();
  return count;
}

// The same without a bug: each part has a number of its own, and what the parts wrote is read when all are done. A
// thread sanitizer that knew nothing of how the threads begin and end would report this.
int64_t no_race(int64_t n, bool team) {
  std::vector<int64_t> counts(n);
  const auto work = [&] { for_parts(n, [&](int64_t i) { counts[i] += 1; }); };
  const auto twice = [&] { work(), work(); };
  if (team)
    on_team(twice);
  else
    twice();
  int64_t count = 0;
  for (const int64_t c : counts) count += c;
  return count;
}

}  // namespace
}  // namespace torchbp

STABLE_TORCH_LIBRARY(torchbp_planted, m) {
  m.def("past_the_end(Tensor x) -> float");
  m.def("misaligned(Tensor x) -> float");
  m.def("overflow(int n) -> int");
  m.def("race(int n, bool team) -> int");
  m.def("no_race(int n, bool team) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(torchbp_planted, CompositeExplicitAutograd, m) {
  m.impl("past_the_end", TORCH_BOX(&torchbp::past_the_end));
  m.impl("misaligned", TORCH_BOX(&torchbp::misaligned));
  m.impl("overflow", TORCH_BOX(&torchbp::overflow));
  m.impl("race", TORCH_BOX(&torchbp::race));
  m.impl("no_race", TORCH_BOX(&torchbp::no_race));
}
