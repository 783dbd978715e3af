// Runs CUDA kernels on the CPU: the threads of a block as fibers (cuda_runtime.h says why and how).
#include <setjmp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace emulator {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr size_t kGuard = 256;  // bytes behind a block's memory that have to stay as they are
constexpr char kFresh = static_cast<char>(0xFF);

enum class State { ready, at_block, at_warp, over };

// A fiber serves one block after another. It is entered by its context once and by longjmp after that, which unlike
// swapcontext asks nothing of the system.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  jmp_buf here;
  bool entered = false;
  State state;
  unsigned mask;  // of the lanes that it waits for
  struct Copy {
    void* to;
    const void* from;
    size_t size;
  };
  std::vector<Copy> copies;  // that it has begun
};

// The block that runs. One at a time: PyTorch calls operations of one thread, and so do the tests.
struct Block {
  Place place{};
  const std::function<void()>* body = nullptr;
  jmp_buf caller;
  std::vector<std::unique_ptr<Fiber>> fibers;  // as many as the largest block so far had threads
  std::vector<uint64_t> exchange;
  std::vector<char> shared;
  std::exception_ptr error;
  std::minstd_rand random{1};

  Fiber& fiber(unsigned thread) { return *fibers[thread]; }
  Fiber& current() { return fiber(place.thread); }
};
Block& block = *new Block;  // never destroyed: a fiber does not end

void pause(State state) {
  Fiber& fiber = block.current();
  fiber.state = state;
  if (!_setjmp(fiber.here)) _longjmp(block.caller, 1);
}

void entry() {
  while (true) {
    try {
      (*block.body)();
    } catch (...) {
      block.error = std::current_exception();
    }
    pause(State::over);
  }
}

// Runs a thread until it waits or is over.
void resume(unsigned thread) {
  block.place.thread = thread;
  Fiber& fiber = block.fiber(thread);
  if (_setjmp(block.caller)) return;
  if (fiber.entered) _longjmp(fiber.here, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}

void add_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = std::make_unique_for_overwrite<char[]>(kStack);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  fiber->state = State::ready;
  makecontext(&fiber->context, entry, 0);
  block.fibers.push_back(std::move(fiber));
}

// Frees those that wait for threads that wait as well. A barrier of a block is for all of it.
void release() {
  const unsigned threads = block.place.threads;
  const auto all_wait = [](unsigned begin, unsigned end, State wanted, unsigned mask) {
    for (unsigned t = begin; t < end; ++t)
      if ((mask >> (t % 32) & 1) && block.fiber(t).state != wanted) return false;
    return true;
  };
  const auto free = [](unsigned begin, unsigned end, unsigned mask) {
    for (unsigned t = begin; t < end; ++t)
      if (mask >> (t % 32) & 1) block.fiber(t).state = State::ready;
  };
  constexpr unsigned everyone = 0xFFFFFFFFu;
  if (all_wait(0, threads, State::at_block, everyone)) return free(0, threads, everyone);
  for (unsigned t = 0; t < threads; ++t) {
    if (block.fiber(t).state != State::at_warp) continue;
    const unsigned begin = t / 32 * 32, end = std::min(begin + 32, threads), mask = block.fiber(t).mask;
    if (all_wait(begin, end, State::at_warp, mask)) free(begin, end, mask);
  }
}

void run_block() {
  const unsigned threads = block.place.threads;
  while (block.fibers.size() < threads) add_fiber();
  block.exchange.assign((threads + 31) / 32 * 32, 0);
  std::vector<unsigned> ready(threads);
  std::iota(ready.begin(), ready.end(), 0);
  // Half of the warps go on only while no other one can: those that kept in step would hide that they must wait.
  const unsigned slow_warps = static_cast<unsigned>(block.random());
  const auto slow = [&](unsigned t) { return slow_warps >> (t / 32) & 1; };
  while (!ready.empty()) {
    if (!std::all_of(ready.begin(), ready.end(), slow)) std::erase_if(ready, slow);
    std::shuffle(ready.begin(), ready.end(), block.random);
    for (const unsigned t : ready) resume(t);
    release();
    ready.clear();
    for (unsigned t = 0; t < threads; ++t)
      if (block.fiber(t).state == State::ready) ready.push_back(t);
  }
  bool over = true;
  for (unsigned t = 0; t < threads; ++t) over &= block.fiber(t).state == State::over;
  if (!over) block.fibers.clear();  // those that wait in the middle of a kernel
  if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
  STD_TORCH_CHECK(over, "emulator: threads of block ", block.place.block, " wait for others that never come");
}

}  // namespace

const Place& place() { return block.place; }

void run(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& body) {
  STD_TORCH_CHECK(blocks >= 1 && threads >= 1 && threads <= 1024, "emulator: no GPU launches ", blocks, " blocks of ",
                  threads, " threads");
  STD_TORCH_CHECK(shared <= kMostShared, "emulator: no block has ", shared, " bytes of shared memory");
  block.body = &body;
  for (unsigned b = 0; b < blocks; ++b) {
    block.place = {0, b, threads, blocks};
    block.shared.assign(15 + shared + kGuard, kFresh);
    for (unsigned t = 0; t < std::min<size_t>(threads, block.fibers.size()); ++t) block.fiber(t).state = State::ready;
    run_block();
    const char* const end = static_cast<const char*>(dynamic_shared()) + shared;
    STD_TORCH_CHECK(std::all_of(end, end + kGuard, [](char c) { return c == kFresh; }), "emulator: block ", b,
                    " writes beyond its shared memory");
  }
}

void* dynamic_shared() {
  void* memory = block.shared.data();
  size_t space = block.shared.size();
  return std::align(16, 0, memory, space);
}

namespace {
std::map<const void*, size_t> allowed;
}

void allow_shared(const void* kernel, size_t bytes) {
  STD_TORCH_CHECK(bytes <= kMostShared, "emulator: no GPU has ", bytes, " bytes of shared memory for a block");
  allowed[kernel] = bytes;
}

void check_shared(const void* kernel, size_t bytes) {
  STD_TORCH_CHECK(bytes <= (48 << 10) || (allowed.count(kernel) && bytes <= allowed[kernel]), "emulator: ", bytes,
                  " bytes of shared memory were not asked for");
}

void copy_later(void* to, const void* from, size_t size) {
  const auto places = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  STD_TORCH_CHECK(places % size == 0, "emulator: a copy of ", size, " bytes is not aligned");
  block.current().copies.push_back({to, from, size});
}

void copy_now() {
  for (const Fiber::Copy& copy : block.current().copies) std::memcpy(copy.to, copy.from, copy.size);
  block.current().copies.clear();
}

void wait_for_block() { pause(State::at_block); }

void wait_for_warp(unsigned mask) {
  block.current().mask = mask;
  pause(State::at_warp);
}

uint64_t* of_warp() { return &block.exchange[block.place.thread / 32 * 32]; }

}  // namespace emulator

// ---- what PyTorch has only where it has CUDA ---------------------------------------------------------------------

AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
