// PyTorch's threads, and teams of them.
#include "threads.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
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
  // The leader's: runs the parts and returns when all are done.
  void run(int64_t n, const Part& part) {
    part_ = part;
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

  // Runs a part, if one is left. Who has taken one may read part_: it is not written before that part is done.
  bool take() {
    int64_t left = tickets_.load(std::memory_order_relaxed);
    do {
      if (left <= 0) return false;
    } while (!tickets_.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed));
    try {
      part_.call(part_.f, left - 1);
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
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  // On cache lines of their own, as they are written and read by all.
  alignas(64) std::atomic<int64_t> tickets_{0};  // parts that nobody has taken yet
  alignas(64) std::atomic<int64_t> done_{0};
};

thread_local Team* team = nullptr;  // that this thread leads

}  // namespace

int64_t thread_count() { return torch::stable::get_num_threads(); }

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
    own.dismiss();
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace torchbp
