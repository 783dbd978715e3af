// PyTorch's threads, and teams of them.
#include "threads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <limits>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace torchbp {
namespace {

// A leader and helpers that wait for parts of its work, awake. Whoever is free takes the next part, the leader too: so
// a helper that comes late, or not at all, holds up nobody.
class Team {
public:
  // The leader's: runs the parts and returns when all are done. It takes the first, as a rule, and so finds in its cache
  // what it left there.
  void run(int64_t n, const Part& part) {
    part_ = part;
    parts_ = n;
    done_.store(0, std::memory_order_relaxed);
    tickets_.store(n, std::memory_order_release);
    while (take()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < n;) wait(spins);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }
  void dismiss() { tickets_.store(kOver, std::memory_order_release); }

  // A helper's: returns when the leader has dismissed the team.
  void help() {
    for (int spins = 0; tickets_.load(std::memory_order_relaxed) != kOver;) {
      if (take())
        spins = 0;
      else
        wait(spins);
    }
  }

private:
  static constexpr int64_t kOver = -1;

  // Runs a part, if one is left. Who has taken one may read part_ and parts_: they are not written before that part is done.
  bool take() {
    int64_t left = tickets_.load(std::memory_order_relaxed);
    do {
      if (left <= 0) return false;
    } while (!tickets_.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed));
    try {
      part_.call(part_.f, parts_ - left);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  // Lets other processes run after a while: a thread of the team may be waiting for its core.
  static void wait(int& spins) {
    if (++spins > 4096) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  Part part_{};
  int64_t parts_ = 0;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  // On cache lines of their own, as they are written and read by all.
  alignas(64) std::atomic<int64_t> tickets_{0};  // parts that nobody has taken yet
  alignas(64) std::atomic<int64_t> done_{0};
};

thread_local Team* team = nullptr;  // that this thread leads
thread_local bool rests = false;    // and that has nothing to do now

// How often a team and its leader alone are tried, and after how many rounds again: the host of a virtual machine moves
// its cores. A round that takes longer is worth all that it takes to pass on work.
constexpr int64_t kTries = 8, kUntilNextTry = 1024;
constexpr double kLongRound = 1e-3;  // seconds

}  // namespace

int64_t thread_count() { return rests ? 1 : torch::stable::get_num_threads(); }

bool leads_team() { return team != nullptr; }

void run_parts(int64_t n, const Part& part) {
  if (team) return team->run(n, part);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) part.call(part.f, i);
  });
}

void run_on_team(const Part& lead) {
  Team own;
  std::exception_ptr error;
  torch::stable::parallel_for(0, thread_count(), 1, [&](int64_t begin, int64_t) {
    if (begin > 0) return own.help();
    team = &own;
    try {
      lead.call(lead.f, 0);
    } catch (...) {
      error = std::current_exception();
    }
    team = nullptr;
    rests = false;
    own.dismiss();
  });
  if (error) std::rethrow_exception(error);
}

void run_rounds(int64_t n, const Part& round) {
  using Clock = std::chrono::steady_clock;
  double best[2] = {};  // seconds: with the team, and alone
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = i % kUntilNextTry;
    if (k == 0) std::fill_n(best, 2, std::numeric_limits<double>::infinity());
    if (team) rests = k >= kTries && best[0] < kLongRound && (k < 2 * kTries || best[1] < best[0]);
    const auto begin = Clock::now();
    round.call(round.f, i);
    best[rests] = std::min(best[rests], std::chrono::duration<double>(Clock::now() - begin).count());
  }
}

}  // namespace torchbp
