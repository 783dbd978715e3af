// The CPU backend: picks the SIMD level, walks strided shapes, and splits work among threads.
#include "backend.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "../check.h"
#include "blocks.h"
#include "levels.h"
#include "threads.h"

namespace torchbp {
namespace {

const Level& detect_level() {
  const char* env = std::getenv("TORCHBP_CPU");
  const std::string_view wanted = env ? env : "";
#if defined(__x86_64__)
  unsigned a, b, c = 0, d;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // not every compiler's supports() knows it
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // The library's products are faster on the tiles of AMX.
  const bool multiplies_pairs = __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_supports("amx-bf16");
  if ((wanted.empty() || wanted == "avx512") && has_avx512)
    return multiplies_pairs ? avx512_bf16_level() : avx512_level();
  if ((wanted.empty() || wanted == "avx2") && has_avx2) return avx2_level();
#endif
  STD_TORCH_CHECK(wanted.empty() || wanted == "baseline", "TORCHBP_CPU=", wanted,
                  ": wants baseline, avx2 or avx512, and a level that this machine has");
  return baseline_level();
}

// PyTorch's own grain: below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// Rows per thread so that a thread's piece holds about kGrain elements.
int64_t row_grain(int64_t row_size) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(row_size, 1)); }

// Asks for huge pages behind a large output that nobody has touched yet: the faults of 4 KiB pages are most of an
// elementwise operation on fresh memory (64 MiB: 35 ms of 43 for one thread). The pages lie within the output, so that
// no more memory is used than without. A hint: what the system makes of it changes no result.
void expect_large([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  if (data == nullptr) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// After which what went past the caches is seen by other threads.
void fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// An output of so many bytes goes past the caches, which it would not fit: a line is then written without having been
// read.
constexpr int64_t kStreamed = 32 << 20;

// One column over strided runs. What is not contiguous, or is to go past the caches, passes through a buffer that stays in
// L1.
class Runs {
public:
  Runs(Kernel kernel, const Loop& loop, bool streams)
      : loop_(loop),
        dtype_(dtype_index(loop.dtype)),
        size_(element_size(dtype_)),
        outputs_(kArity[static_cast<int>(kernel)].outputs),
        column_(level().column[static_cast<int>(kernel)][dtype_]) {
    for (int k = 0; k < loop.operands; ++k) {
      direct_[k] = loop.strides[k][0] == size_ && !(streams && k < outputs_);
      all_direct_ &= direct_[k];
    }
  }

  // The run of n elements that begins at `data` of each operand.
  void operator()(char* const* data, int64_t n) {
    if (all_direct_) return run(reinterpret_cast<void* const*>(data), n);
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t m = std::min(kBlock, n - begin);
      void* pointer[kMaxOperands];
      for (int k = 0; k < loop_.operands; ++k) {
        const int64_t stride = loop_.strides[k][0];
        char* const here = data[k] + begin * stride;
        pointer[k] = direct_[k] ? here : buffer_[k];
        const bool already_there = stride == 0 && begin > 0;
        if (k >= outputs_ && !direct_[k] && !already_there) level().load[dtype_](buffer_[k], here, stride, m);
      }
      run(pointer, m);
      for (int k = 0; k < outputs_; ++k) {
        const int64_t stride = loop_.strides[k][0];
        char* const here = data[k] + begin * stride;
        if (direct_[k]) continue;
        if (stride == size_)
          level().stream[dtype_](here, buffer_[k], m);
        else
          level().store[dtype_](here, stride, buffer_[k], m);
      }
    }
  }

private:
  static constexpr int64_t kBlock = 512;

  void run(void* const* operands, int64_t n) {
    column_(operands, reinterpret_cast<const void* const*>(operands + outputs_), n, loop_.parameter);
  }

  const Loop& loop_;
  DtypeIndex dtype_;
  int64_t size_;
  int outputs_;
  ColumnFunction column_;
  bool direct_[kMaxOperands], all_direct_ = true;
  alignas(64) char buffer_[kMaxOperands][kBlock * sizeof(double)];
};

// Sums in blocks of fixed size, whose partial sums are added in order: the result does not depend on the threads.
template <class F>
double blocked_sum(int64_t n, const F& sum_of_range) {
  if (n <= kGrain) return sum_of_range(0, n);
  std::vector<double> partial((n + kGrain - 1) / kGrain);
  for_ranges(static_cast<int64_t>(partial.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) partial[b] = sum_of_range(b * kGrain, std::min(n, (b + 1) * kGrain));
  });
  double sum = 0;
  for (const double p : partial) sum += p;
  return sum;
}

void write_number(void* p, DtypeIndex dtype, double value) {
  if (dtype == kFloat64)
    *static_cast<double*>(p) = value;
  else if (dtype == kFloat32)
    *static_cast<float*>(p) = static_cast<float>(value);
  else if (dtype == kBFloat16)
    *static_cast<torch::headeronly::BFloat16*>(p) = static_cast<float>(value);
  else
    *static_cast<torch::headeronly::Half*>(p) = static_cast<float>(value);
}

}  // namespace

const Level& level() {
  static const Level& chosen = detect_level();
  return chosen;
}

const char* cpu_level() { return level().name; }

Tensor Cpu::empty_result(Sizes sizes, const int64_t* strides, ScalarType dtype, const Tensor& like) {
  return empty_in_block(sizes, strides, dtype, like, 1 << 20);
}

void Cpu::elementwise(Kernel kernel, const Loop& loop) {
  const int64_t bytes = loop.numel * element_size(dtype_index(loop.dtype));
  for (int k = 0; k < kArity[static_cast<int>(kernel)].outputs; ++k) expect_large(loop.data[k], bytes);
  const bool streams = bytes >= kStreamed;
  for_ranges(loop.numel, kGrain, [&](int64_t begin, int64_t end) {
    Runs runs(kernel, loop, streams);
    // The position of `begin`, then run after run along the innermost dimension.
    int64_t position[kMaxDims];
    char* data[kMaxOperands];
    std::copy_n(loop.data, loop.operands, data);
    int64_t rest = begin;
    for (int d = 0; d < loop.ndim; ++d) {
      position[d] = rest % loop.sizes[d];
      rest /= loop.sizes[d];
      for (int k = 0; k < loop.operands; ++k) data[k] += position[d] * loop.strides[k][d];
    }
    for (int64_t i = begin; i < end;) {
      const int64_t n = std::min(end - i, loop.sizes[0] - position[0]);
      runs(data, n);
      i += n;
      for (int k = 0; k < loop.operands; ++k) data[k] += n * loop.strides[k][0];
      position[0] += n;
      for (int d = 0; d + 1 < loop.ndim && position[d] == loop.sizes[d]; ++d) {
        position[d] = 0;
        ++position[d + 1];
        for (int k = 0; k < loop.operands; ++k) data[k] += loop.strides[k][d + 1] - loop.sizes[d] * loop.strides[k][d];
      }
    }
    if (streams) fence();
  });
}

namespace {

// Pieces of rows, of a size that depends on the number of classes alone: about kPiece numbers, in whole blocks of
// lanes where that is several rows. An exponential each makes less of them worth a thread than of kGrain.
constexpr int64_t kPiece = 4096;

int64_t rows_per_piece(int64_t classes) {
  const int64_t rows = kPiece / std::max<int64_t>(classes, 1);
  return rows >= 128 ? rows / 64 * 64 : std::max<int64_t>(rows, 1);
}

template <class F>
void for_pieces(const SoftmaxCE& ce, const F& f) {
  const int64_t rows = rows_per_piece(ce.classes);
  for_ranges((ce.n + rows - 1) / rows, 2, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) f(piece, piece * rows, std::min(ce.n, (piece + 1) * rows));
  });
}

}  // namespace

void Cpu::softmax_ce_forward(const SoftmaxCE& ce, Reduction reduction, void* loss, void* total) {
  const DtypeIndex dtype = dtype_index(ce.dtype), compute = compute_index(dtype);
  double counted = ce.classes > 0 ? static_cast<double>(ce.n) : 0.0;  // a mean over no classes is 0 / 0, as in PyTorch
  if (!ce.soft) {
    int64_t bad_row = -1;
    counted = blocked_sum(
        ce.n, [&](int64_t begin, int64_t end) { return level().softmax_ce_count[dtype](ce, begin, end, bad_row); });
    STD_TORCH_CHECK(bad_row < 0, "torchbp::softmax_ce: target ", ce.target[bad_row], " in row ", bad_row,
                    " is out of range for ", ce.classes, " classes");
  }
  write_number(total, compute, reduction == Reduction::mean ? counted : 1.0);

  SoftmaxCE rows = ce;
  rows.total = total;
  rows.loss = reduction == Reduction::none ? loss : nullptr;
  expect_large(rows.grad_input, ce.n * ce.classes * element_size(dtype));
  std::vector<double> lost((ce.n + rows_per_piece(ce.classes) - 1) / rows_per_piece(ce.classes));
  for_pieces(rows, [&](int64_t piece, int64_t begin, int64_t end) {
    lost[piece] = level().softmax_ce_forward[dtype](rows, begin, end);
  });
  if (reduction == Reduction::none) return;
  double sum = 0;
  for (const double l : lost) sum += l;
  write_number(loss, dtype, reduction == Reduction::mean ? sum / counted : sum);
}

void Cpu::softmax_ce_backward(const SoftmaxCE& ce) {
  const DtypeIndex dtype = dtype_index(ce.dtype);
  for (void* gradient : {ce.grad_input, ce.grad_probabilities})
    expect_large(gradient, ce.n * ce.classes * element_size(dtype));
  for_pieces(ce, [&](int64_t, int64_t begin, int64_t end) { level().softmax_ce_backward[dtype](ce, begin, end); });
}

void Cpu::maxout_forward(const Maxout& maxout) {
  for_ranges(maxout.n, row_grain(maxout.pieces * maxout.out), [&](int64_t begin, int64_t end) {
    level().maxout_forward[dtype_index(maxout.dtype)](maxout, begin, end);
  });
}

void Cpu::maxout_backward(const Maxout& maxout) {
  for_ranges(maxout.n, row_grain(maxout.pieces * maxout.out), [&](int64_t begin, int64_t end) {
    level().maxout_backward[dtype_index(maxout.dtype)](maxout, begin, end);
  });
}

void Cpu::add_sum_of_squares(const void* data, ScalarType dtype, int64_t n, void* result, int32_t) {
  const DtypeIndex index = dtype_index(dtype);
  const int64_t size = element_size(index);
  const double sum = blocked_sum(n, [&](int64_t begin, int64_t end) {
    return level().sum_of_squares[index](static_cast<const char*>(data) + begin * size, end - begin);
  });
  if (index == kFloat64)
    *static_cast<double*>(result) += sum;
  else
    *static_cast<float*>(result) += static_cast<float>(sum);
}

void Cpu::update(const std::vector<Parameter>& parameters) {
  int64_t total = 0;
  for (const Parameter& p : parameters) total += p.n;
  // The elements [begin, end) of all parameters, one after the other.
  const auto run = [&](int64_t begin, int64_t end) {
    int64_t at = 0;
    for (const Parameter& p : parameters) {
      const int64_t first = std::max(begin - at, int64_t(0)), n = std::min(end - at, p.n) - first;
      at += p.n;
      if (n <= 0) continue;
      const int64_t offset = first * element_size(dtype_index(p.dtype));
      const auto moved = [&](auto* data) { return data ? static_cast<char*>(data) + offset : nullptr; };
      level().update[dtype_index(p.dtype)](p.update, moved(p.data), static_cast<const char*>(p.grad) + offset,
                                           moved(p.state[0]), moved(p.state[1]), n);
    }
  };
  // Those that share memory are updated in turn, as one after the other would be.
  for_ranges(total, total > kGrain && overlap(parameters) ? total : kGrain, run);
}

void Cpu::batch(const Batch& batch, int64_t copies, int64_t apart) {
  const auto fill = level().batch[dtype_index(batch.dtype)];
  if (copies == 1)
    return for_ranges(batch.n, row_grain(batch.channels * batch.height * batch.width),
                      [&](int64_t begin, int64_t end) { fill(batch, begin, end); });
  for_parts(copies, [&](int64_t i) {
    Batch copy = batch;
    copy.out = static_cast<char*>(batch.out) + i * apart;
    fill(copy, 0, copy.n);
  });
}

}  // namespace torchbp
