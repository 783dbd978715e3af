// How work is split among PyTorch's threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace torchbp {

// Threads that a call may use.
int64_t thread_count();

// Whether this thread leads a team (on_team), in which parts cost a fraction of a microsecond and not several.
bool leads_team();

// A function of one number, by reference.
struct Part {
  void (*call)(const void* f, int64_t i);
  const void* f;
};

void run_parts(int64_t n, const Part& part);
void run_on_team(const Part& lead);
void run_rounds(int64_t n, const Part& round);

// Runs f(0), ..., f(n - 1), each on a thread of its own where there are as many.
template <class F>
void for_parts(int64_t n, const F& f) {
  if (n == 1) return f(int64_t(0));
  run_parts(n, {[](const void* g, int64_t i) { (*static_cast<const F*>(g))(i); }, &f});
}

// Runs f(begin, end) on ranges that make up [0, n): more than one only where n is more than `grain`.
template <class F>
void for_ranges(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const int64_t parts = std::min((n - 1) / std::max<int64_t>(grain, 1) + 1, thread_count());
  for_parts(parts, [&](int64_t i) { f(n * i / parts, n * (i + 1) / parts); });
}

// Runs f() with a team of threads that stay awake for the parts that f splits its work into, until it returns: for a
// row of short pieces of work, each of which waits for the one before.
template <class F>
void on_team(const F& f) {
  if (thread_count() == 1 || leads_team()) return f();
  run_on_team({[](const void* g, int64_t) { (*static_cast<const F*>(g))(); }, &f});
}

// Runs f(0), ..., f(n - 1), one after the other, on a team, or on this thread alone while that is faster: passing on a
// part takes 0.1 us between cores that share a cache and several times that between others, and small parts take less.
template <class F>
void on_team_in_rounds(int64_t n, const F& f) {
  on_team([&] { run_rounds(n, {[](const void* g, int64_t i) { (*static_cast<const F*>(g))(i); }, &f}); });
}

}  // namespace torchbp
