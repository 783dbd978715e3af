// Softmax cross-entropy: one kernel for loss and gradient, one for the gradient alone, and a small one before the former.
//
// A row is read from memory once and its gradient written once: in between it is in shared memory, where the gradient
// takes its place. That is also what makes accesses 16 bytes wide and coalesced whatever the number of classes. Rows that
// do not fit there (227 KiB on an H100: 58,000 classes of float32) are read twice.
//
//   classes       a row belongs to     in shared memory
//   to 32         a thread             128 rows, each padded to an odd number of words, so that 32 threads reading one
//                                      column of their rows meet 32 banks
//   to 1024       a warp               a row of each warp
//   more          a block              its row
//
// What a mean is divided by has to be known before the first gradient is written, so that ce_prepare reads the targets
// first. It checks them, too. The sum of the losses is made by the block that ends last, from what each block has
// written, in an order that depends on the sizes alone.
#include <cuda_pipeline.h>

#include <atomic>
#include <mutex>

#define TORCHBP_LEVEL cuda
#include "../softmax_ce.h"
#include "backend.h"
#include "group.h"
#include "launch.h"

namespace torchbp {
namespace cuda {
namespace {

// ---- who works on a row ------------------------------------------------------------------------------------------

template <int width_of_row, int threads_of_block>
struct Layout {
  static constexpr int width = width_of_row, threads = threads_of_block;
  static constexpr int rows = threads / width;  // of a block at a time
};
using PerThread = Layout<1, 128>;
using PerWarp = Layout<32, 128>;
using PerBlock = Layout<512, 512>;
using PerLargeBlock = Layout<1024, 1024>;
constexpr int64_t kPerThread = 32, kPerWarp = 1024, kPerBlock = 8192;  // classes, at most

// How rows lie in a block's shared memory.
struct Room {
  bool used = false;
  int64_t row = 0;   // elements from one row to the next
  Divider classes;   // PerThread: of the columns
  bool wide = true;  // PerThread: whether 16 bytes may be moved at a time
};

// ---- between memory and shared memory ----------------------------------------------------------------------------

// Copies n elements between the same place of 16 bytes in both; what is left at both ends goes one by one. The group has
// to wait before it reads.
template <class Group, class T>
__device__ __forceinline__ void copy_in(const Group& group, T* to, const T* from, int64_t n) {
  constexpr int64_t pack = Pack<T>::size;
  const int64_t place = static_cast<int64_t>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
  const int64_t head = n < (pack - place) % pack ? n : (pack - place) % pack;
  const int64_t packs = (n - head) / pack;
  for (int64_t i = group.rank; i < packs; i += group.size)
    __pipeline_memcpy_async(to + head + i * pack, from + head + i * pack, 16);
  __pipeline_commit();
  for (int64_t i = group.rank; i < head; i += group.size) to[i] = from[i];
  for (int64_t i = head + packs * pack + group.rank; i < n; i += group.size) to[i] = from[i];
}

// The same back; element by element if the places differ.
template <class Group, class T>
__device__ __forceinline__ void copy_out(const Group& group, T* to, const T* from, int64_t n) {
  constexpr int64_t pack = Pack<T>::size;
  const int64_t place = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 16 / sizeof(T));
  const bool alike = (reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from)) % 16 == 0;
  const int64_t head = !alike || n < (pack - place) % pack ? n : (pack - place) % pack;
  const int64_t packs = (n - head) / pack;
  for (int64_t i = group.rank; i < packs; i += group.size)
    reinterpret_cast<Pack<T>*>(to + head)[i] = reinterpret_cast<const Pack<T>*>(from + head)[i];
  for (int64_t i = group.rank; i < head; i += group.size) to[i] = from[i];
  for (int64_t i = head + packs * pack + group.rank; i < n; i += group.size) to[i] = from[i];
}

// n elements of whole rows: f(k, place) says where in shared memory the k-th of a pack is. Columns are counted on from
// that of the first, which costs the one division.
template <class T, class F>
__device__ __forceinline__ void for_places(const Room& room, uint32_t first, int n, const F& f) {
  uint32_t row = room.classes.divide(first), column = first - row * room.classes.divisor;
#pragma unroll
  for (int k = 0; k < Pack<T>::size; ++k) {
    if (k >= n) break;
    f(k, row * static_cast<uint32_t>(room.row) + column);
    if (++column == room.classes.divisor) column = 0, ++row;
  }
}

template <class T>
__device__ __forceinline__ void spread(const Room& room, T* shared, const T* from, uint32_t n) {
  constexpr int pack = Pack<T>::size, unroll = 4;  // packs that are read before the first is written
  const uint32_t packs = room.wide ? n / pack : 0;
  for (uint32_t p = threadIdx.x; p < packs; p += unroll * blockDim.x) {
    Pack<T> v[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      if (p + u * blockDim.x < packs) v[u] = reinterpret_cast<const Pack<T>*>(from)[p + u * blockDim.x];
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      if (p + u * blockDim.x < packs)
        for_places<T>(room, (p + u * blockDim.x) * pack, pack,
                      [&](int k, uint32_t place) { shared[place] = v[u].value[k]; });
  }
  for (uint32_t i = packs * pack + threadIdx.x; i < n; i += blockDim.x)
    for_places<T>(room, i, 1, [&](int, uint32_t place) { shared[place] = from[i]; });
}

template <class T>
__device__ __forceinline__ void gather(const Room& room, T* to, const T* shared, uint32_t n) {
  constexpr int pack = Pack<T>::size;
  const uint32_t packs = room.wide ? n / pack : 0;
  for (uint32_t p = threadIdx.x; p < packs; p += blockDim.x) {
    Pack<T> v;
    for_places<T>(room, p * pack, pack, [&](int k, uint32_t place) { v.value[k] = shared[place]; });
    reinterpret_cast<Pack<T>*>(to)[p] = v;
  }
  for (uint32_t i = packs * pack + threadIdx.x; i < n; i += blockDim.x)
    for_places<T>(room, i, 1, [&](int, uint32_t place) { to[i] = shared[place]; });
}

// f(group, i, x, dx) for each row i that this thread has a part in; x is where the row is, and what f writes to dx (null
// if `out` is), which may be x, becomes row i of `out`. The whole group runs through the same rows.
template <class Layout, class T, class F>
__device__ __forceinline__ void for_rows(const SoftmaxCE& a, const Room& room, void* out, const F& f) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * Layout::rows;
  const Group<Layout::width> group;
  const T* const input = static_cast<const T*>(a.input);
  T* const output = static_cast<T*>(out);
  T* const shared = static_cast<T*>(dynamic_shared()) + threadIdx.x / Layout::width * room.row;
  int64_t first = static_cast<int64_t>(blockIdx.x) * Layout::rows;
  if constexpr (Layout::width == 1) {
    for (; first < a.n; first += step) {
      const int rows = a.n - first < Layout::rows ? static_cast<int>(a.n - first) : Layout::rows;
      const uint32_t n = static_cast<uint32_t>(rows * a.classes);
      spread(room, static_cast<T*>(dynamic_shared()), input + first * a.classes, n);
      __syncthreads();
      if (threadIdx.x < rows) f(group, first + threadIdx.x, shared, out ? shared : nullptr);
      __syncthreads();
      if (out) gather(room, output + first * a.classes, static_cast<const T*>(dynamic_shared()), n);
      __syncthreads();  // the next rows take this place
    }
  } else {
    for (int64_t i = first + threadIdx.x / Layout::width; i < a.n; i += step) {
      const T* const x = input + i * a.classes;
      T* const dx = out ? output + i * a.classes : nullptr;
      if (!room.used) {
        f(group, i, x, dx);
        continue;
      }
      T* const row = shared + reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T);
      copy_in(group, row, x, a.classes);
      __pipeline_wait_prior(0);
      group.sync();
      f(group, i, row, out ? row : nullptr);
      group.sync();
      if (out) copy_out(group, dx, row, a.classes);
      group.sync();  // the next row takes this place
    }
  }
}

// ---- the kernels -------------------------------------------------------------------------------------------------

// A class index that is out of range, in memory of the host that the GPU writes to.
struct Report {
  int64_t position, target, classes;
  int set;
};

constexpr int kParts = 32;             // blocks of ce_prepare, at most: a warp adds them up
constexpr int64_t kMostBlocks = 2048;  // of ce_forward

// What the kernels of one call hand on.
struct Between {
  int parts;        // of the next two
  double* counted;  // what the rows count
  int64_t* bad;     // the first row whose class index is out of range, or kNone
  unsigned* ended;  // blocks of ce_forward
  double* lost;     // by each of them
  Report* report;   // or null
};
constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

template <class T>
__global__ void __launch_bounds__(kThreads) ce_prepare(const __grid_constant__ SoftmaxCE a, Between between) {
  double counted = 0;
  int64_t bad = kNone;
#pragma unroll 4
  for (int64_t i = thread_index(); i < a.n; i += thread_count()) {
    const Row<T> row(a, i);
    if (row.ignored()) continue;
    if (row.in_range())
      counted += row.counts();
    else if (i < bad)
      bad = i;
  }
  const Group<kThreads> group;
  counted = group.sum(counted);
  bad = -group.max(-bad);
  if (threadIdx.x != 0) return;
  between.counted[blockIdx.x] = counted;
  between.bad[blockIdx.x] = bad;
  if (blockIdx.x == 0) *between.ended = 0;
}

__device__ __forceinline__ void report(const SoftmaxCE& a, const Between& between) {
  int64_t bad = kNone;
  for (int p = 0; p < between.parts; ++p) bad = between.bad[p] < bad ? between.bad[p] : bad;
  if (bad == kNone) return;
  volatile Report& to = *between.report;
  to.position = bad;
  to.target = a.target[bad];
  to.classes = a.classes;
  __threadfence_system();
  to.set = 1;
}

// The loss of each row, of which a bad class index makes nan, their sum or mean, and if a.grad_input is given the
// gradient. `total` may be null.
template <class T, class Layout>
__global__ void __launch_bounds__(Layout::threads)
    ce_forward(const __grid_constant__ SoftmaxCE a, const __grid_constant__ Room room, const Between between,
               const Reduction reduction, T* loss, Compute<T>* total) {
  using C = Compute<T>;
  double counted = 1;
  if (reduction == Reduction::mean) {
    const Group<32> warp;
    counted = warp.sum(warp.rank < between.parts ? between.counted[warp.rank] : 0.0);
  }
  double lost = 0;
  for_rows<Layout, T>(a, room, a.grad_input, [&](const auto& group, int64_t i, const T* x, T* dx) {
    const Row<T> row(a, i, x);
    C shift, sum, row_lost = 0;
    softmax(group, x, a.classes, shift, sum);
    const C log_sum = log(sum);
    if (!row.ignored())
      row_lost = row.in_range() ? row.loss(group, shift, log_sum) : std::numeric_limits<C>::quiet_NaN();
    if (group.rank == 0) {
      if (a.lse) static_cast<C*>(a.lse)[i] = shift + log_sum;
      if (reduction == Reduction::none) store(loss + i, row_lost);
      lost += row_lost;
    }
    if (dx == nullptr) return;
    group.sync();  // all have read x of the target
    row.backward(group, C(1) / static_cast<C>(counted), shift, sum, dx);
  });
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    if (total) *total = static_cast<C>(counted);
    if (between.report) report(a, between);
  }
  if (reduction == Reduction::none) return;

  const Group<Layout::threads> block;
  lost = block.sum(lost);
  __shared__ bool last;
  if (threadIdx.x == 0) {
    between.lost[blockIdx.x] = lost;
    __threadfence();
    last = atomicAdd(between.ended, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  lost = block.sum_of(gridDim.x, [&](int64_t i) { return __ldcg(between.lost + i); });
  if (threadIdx.x == 0) store(loss, static_cast<C>(lost / counted));
}

// What ce_scale knows besides a SoftmaxCE.
struct Known {
  bool gradient = false;  // a.grad_input holds the gradient for an upstream gradient of 1
  bool mean = false;
};

template <class T>
__device__ __forceinline__ void scale(T* x, int64_t n, Compute<T> factor) {
  constexpr int64_t pack = Pack<T>::size;
  const bool wide = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const int64_t packs = wide ? n / pack : 0;
  for (int64_t p = thread_index(); p < packs; p += thread_count()) {
    Pack<T> v = reinterpret_cast<const Pack<T>*>(x)[p];
#pragma unroll
    for (int k = 0; k < pack; ++k) store(&v.value[k], load(v.value[k]) * factor);
    reinterpret_cast<Pack<T>*>(x)[p] = v;
  }
  for (int64_t i = packs * pack + thread_index(); i < n; i += thread_count()) store(x + i, load(x[i]) * factor);
}

// One gradient, that of the logits or that of class probabilities. Where the former is known, the upstream gradient,
// which the host has not seen, says what is left to do: nothing if it is 1, a multiplication if it is finite. Infinity
// times the 0 of an ignored row is not 0, so that all is computed anew otherwise.
template <class T, class Layout>
__global__ void __launch_bounds__(Layout::threads)
    ce_backward(const __grid_constant__ SoftmaxCE a, const __grid_constant__ Room room, const Known known) {
  using C = Compute<T>;
  double total = 1;
  if (known.gradient) {
    const C factor = load(*static_cast<const T*>(a.grad));
    if (factor == 1) return;
    if (abs(factor) <= std::numeric_limits<C>::max())
      return scale(static_cast<T*>(a.grad_input), a.n * a.classes, factor);
    if (known.mean)
      total = Group<Layout::threads>().sum_of(a.n, [&](int64_t i) {
        const Row<T> row(a, i);
        return row.ignored() || !row.in_range() ? C(0) : row.counts();
      });
  } else {
    total = *static_cast<const C*>(a.total);
  }
  void* const out = a.grad_input ? a.grad_input : a.grad_probabilities;
  for_rows<Layout, T>(a, room, out, [&](const auto& group, int64_t i, const T* x, T* dx) {
    const Row<T> row(a, i, x);
    if (a.grad_input) {
      C shift, sum;
      softmax(group, x, a.classes, shift, sum);
      row.backward(group, row.upstream(static_cast<C>(total)), shift, sum, dx);
    } else {
      row.backward_probabilities(group, static_cast<const C*>(a.lse)[i], dx);
    }
  });
}

// ---- launches ----------------------------------------------------------------------------------------------------

// Elements from one row to the next in shared memory: an odd number of words of 4 bytes, where an element has 8 of 8.
int64_t padded(int64_t classes, size_t element) {
  if (element > 2) return classes | 1;
  return classes % 4 == 0 ? classes + 2 : classes;
}

// f(layout, blocks, bytes of shared memory, room) for a number of rows.
template <class T, class F>
void with_layout(const Launch& launch, const SoftmaxCE& ce, bool keep_rows, const F& f) {
  Room room;
  const auto with = [&](auto layout, int64_t elements) {
    using Layout = decltype(layout);
    room.used = elements > 0;
    room.row = elements;
    const int64_t blocks = std::min<int64_t>(blocks_for(ce.n, Layout::rows), kMostBlocks);
    f(layout, static_cast<unsigned>(blocks), static_cast<size_t>(elements * Layout::rows) * sizeof(T), room);
  };
  if (ce.classes <= kPerThread) {
    room.classes = Divider(std::max<int64_t>(ce.classes, 1));
    room.wide = reinterpret_cast<uintptr_t>(ce.input) % 16 == 0 &&
                reinterpret_cast<uintptr_t>(ce.grad_input) % 16 == 0 &&
                reinterpret_cast<uintptr_t>(ce.grad_probabilities) % 16 == 0;
    return with(PerThread(), padded(ce.classes, sizeof(T)));
  }
  // As much as the row has, in steps of 16 bytes, and as much before it as puts it at its place of 16 bytes.
  constexpr int64_t pack = Pack<T>::size;
  const int64_t elements = keep_rows ? (ce.classes + pack - 1) / pack * pack + pack : 0;
  if (ce.classes <= kPerWarp) return with(PerWarp(), elements);
  int most = 0;  // bytes of a block, of which the sums of its warps take some
  launch.check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, ce.device));
  const bool fits = elements * static_cast<int64_t>(sizeof(T)) + 2048 <= most;
  if (ce.classes <= kPerBlock) return with(PerBlock(), fits ? elements : 0);
  with(PerLargeBlock(), fits ? elements : 0);
}

template <class T>
void launch_backward(const Launch& launch, const SoftmaxCE& ce, const Known& known) {
  // What is known is hardly ever computed anew: no room for that.
  with_layout<T>(launch, ce, !known.gradient, [&](auto layout, unsigned blocks, size_t bytes, const Room& room) {
    launch.with_shared(bytes, ce_backward<T, decltype(layout)>, blocks, layout.threads, ce, room, known);
  });
}

// ---- class indices out of range ----------------------------------------------------------------------------------

// The report of a device; null where there is none. The memory is of the first call and for good.
Report* report_of(const Launch& launch, int32_t device) {
  constexpr int32_t most = 64;
  static std::mutex mutex;
  static Report* all = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (all == nullptr) {
    if (launch.capturing()) return nullptr;  // nothing may be allocated
    void* memory = nullptr;
    launch.check(cudaHostAlloc(&memory, most * sizeof(Report), cudaHostAllocPortable | cudaHostAllocMapped));
    std::memset(memory, 0, most * sizeof(Report));
    all = static_cast<Report*>(memory);
  }
  device = std::max<int32_t>(device, 0);  // the emulator's is -1
  return device < most ? all + device : nullptr;
}

// Raises what kernels that have run so far have reported.
void raise_reported(Report* report) {
  if (report == nullptr) return;
  std::atomic_ref<int> set(report->set);
  if (set.load(std::memory_order_acquire) == 0) return;
  const Report bad = *report;
  set.store(0, std::memory_order_relaxed);
  STD_TORCH_CHECK(false, "torchbp::softmax_ce: target wants class indices from 0 to ", bad.classes - 1, ", got ",
                  bad.target, " at position ", bad.position,
                  " (here or in an earlier call, whose loss was nan: a GPU is not waited for, but with "
                  "CUDA_LAUNCH_BLOCKING=1)");
}

}  // namespace
}  // namespace cuda

using cuda::Compute;
using cuda::Launch;
using cuda::with_type;

void Cuda::softmax_ce_forward(const SoftmaxCE& ce, Reduction reduction, void* loss, void* total) {
  const Launch launch("softmax_ce", ce.device);
  cuda::Report* const report = ce.soft ? nullptr : cuda::report_of(launch, ce.device);
  cuda::raise_reported(report);
  with_type(ce.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::with_layout<T>(launch, ce, true, [&](auto layout, unsigned blocks, size_t bytes, const cuda::Room& room) {
      cuda::Between between;
      between.parts = static_cast<int>(std::min<int64_t>(cuda::blocks_for(ce.n, 4 * cuda::kThreads), cuda::kParts));
      between.report = report;
      const auto memory = cuda::scratch(ScalarType::Double, 2 * cuda::kParts + 1 + blocks, ce.device);
      between.counted = static_cast<double*>(memory.mutable_data_ptr());
      between.bad = reinterpret_cast<int64_t*>(between.counted + cuda::kParts);
      between.ended = reinterpret_cast<unsigned*>(between.counted + 2 * cuda::kParts);
      between.lost = between.counted + 2 * cuda::kParts + 1;
      if (reduction != Reduction::none || report)
        launch(cuda::ce_prepare<T>, static_cast<unsigned>(between.parts), cuda::kThreads, ce, between);
      launch.with_shared(bytes, cuda::ce_forward<T, decltype(layout)>, blocks, layout.threads, ce, room, between,
                         reduction, static_cast<T*>(loss), static_cast<Compute<T>*>(total));
    });
  });
  cuda::raise_reported(report);  // what can be known by now: where launches wait
}

void Cuda::softmax_ce_backward(const SoftmaxCE& ce) {
  const Launch launch("softmax_ce_backward", ce.device);
  for (void* SoftmaxCE::* const which : {&SoftmaxCE::grad_input, &SoftmaxCE::grad_probabilities}) {
    SoftmaxCE one = ce;
    one.grad_input = one.grad_probabilities = nullptr;
    one.*which = ce.*which;
    if (one.*which == nullptr || ce.n * ce.classes == 0) continue;
    with_type(ce.dtype, [&](auto zero) { cuda::launch_backward<decltype(zero)>(launch, one, {}); });
  }
}

void Cuda::softmax_ce_scale(const SoftmaxCE& ce, Reduction reduction) {
  const Launch launch("softmax_ce_scale_", ce.device);
  if (!ce.soft) cuda::raise_reported(cuda::report_of(launch, ce.device));
  if (ce.n * ce.classes == 0) return;
  const cuda::Known known{.gradient = true, .mean = reduction == Reduction::mean};
  with_type(ce.dtype, [&](auto zero) { cuda::launch_backward<decltype(zero)>(launch, ce, known); });
}

}  // namespace torchbp
