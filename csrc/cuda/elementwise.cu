// The elementwise kernels: every column of the table, over contiguous memory and over anything else.
#define TORCHBP_LEVEL cuda
#include "../columns.h"
#include "backend.h"
#include "launch.h"

namespace torchbp {
namespace cuda {
namespace {

// One element of every operand: in, apply, out. at(k) is the address of operand k, outputs first.
template <class F, class T>
struct Element {
  using C = Compute<T>;
  C in[F::inputs];

  template <class At>
  __device__ __forceinline__ void read(const At& at) {
#pragma unroll
    for (int k = 0; k < F::inputs; ++k) in[k] = load(*at(F::outputs + k));
  }
  template <class At>
  __device__ __forceinline__ void write(const At& at, C parameter) const {
    C out[F::outputs];
    F::apply(in, out, parameter);
#pragma unroll
    for (int k = 0; k < F::outputs; ++k) store(at(k), out[k]);
  }
};

// ---- contiguous --------------------------------------------------------------------------------------------------

template <class F>
struct Pointers {
  char* data[F::outputs + F::inputs];
};

// All operands contiguous and aligned to 16 bytes. An output may be an input's own memory: a thread reads all of its
// elements before it writes them.
template <class F, class T>
__global__ void __launch_bounds__(kThreads) contiguous(Pointers<F> p, int64_t numel, Compute<T> parameter) {
  using P = Pack<T>;
  constexpr int operands = F::outputs + F::inputs;
  const int64_t packs = numel / P::size;
  for (int64_t i = thread_index(); i < packs; i += thread_count()) {
    P pack[operands];
#pragma unroll
    for (int k = F::outputs; k < operands; ++k) pack[k] = reinterpret_cast<const P*>(p.data[k])[i];
#pragma unroll
    for (int j = 0; j < P::size; ++j) {
      const auto at = [&](int k) { return &pack[k].value[j]; };
      Element<F, T> element;
      element.read(at);
      element.write(at, parameter);
    }
#pragma unroll
    for (int k = 0; k < F::outputs; ++k) reinterpret_cast<P*>(p.data[k])[i] = pack[k];
  }
  for (int64_t i = packs * P::size + thread_index(); i < numel; i += thread_count()) {
    const auto at = [&](int k) { return reinterpret_cast<T*>(p.data[k]) + i; };
    Element<F, T> element;
    element.read(at);
    element.write(at, parameter);
  }
}

// ---- strided and broadcast ---------------------------------------------------------------------------------------

// A Loop as a kernel parameter: fewer dimensions and fewer than 2^31 elements.
constexpr int kWalkDims = 16;
struct Walk {
  uint32_t numel;
  int ndim;
  Divider sizes[kWalkDims];
  char* data[kMaxOperands];
  int64_t strides[kMaxOperands][kWalkDims];
};

constexpr int kUnroll = 4;  // elements that a thread reads before it writes the first

template <class F, class T>
__global__ void __launch_bounds__(kThreads) strided(const __grid_constant__ Walk walk, Compute<T> parameter) {
  constexpr int operands = F::outputs + F::inputs;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  T* address[kUnroll][operands];
  Element<F, T> element[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kThreads >= walk.numel) break;
    uint32_t rest = static_cast<uint32_t>(first + u * kThreads);
    int64_t offset[operands] = {};
    for (int d = 0; d < walk.ndim; ++d) {
      const uint32_t outer = d + 1 < walk.ndim ? walk.sizes[d].divide(rest) : 0;
      const uint32_t position = rest - outer * walk.sizes[d].divisor;
#pragma unroll
      for (int k = 0; k < operands; ++k) offset[k] += position * walk.strides[k][d];
      rest = outer;
    }
#pragma unroll
    for (int k = 0; k < operands; ++k) address[u][k] = reinterpret_cast<T*>(walk.data[k] + offset[k]);
    element[u].read([&](int k) { return address[u][k]; });
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kThreads >= walk.numel) break;
    element[u].write([&](int k) { return address[u][k]; }, parameter);
  }
}

// The part [begin, begin + size) of dimension d.
Loop part_of(const Loop& loop, int d, int64_t begin, int64_t size) {
  Loop part = loop;
  part.numel = loop.numel / loop.sizes[d] * size;
  part.sizes[d] = size;
  for (int k = 0; k < loop.operands; ++k) part.data[k] += begin * loop.strides[k][d];
  return part;
}

// Launches as many Walks as the loop needs: one, but for loops of 2^31 elements or of more than kWalkDims dimensions.
template <class F, class T>
void launch_strided(const Launch& launch, const Loop& loop) {
  if (loop.numel > std::numeric_limits<int32_t>::max()) {
    const int d = static_cast<int>(std::max_element(loop.sizes, loop.sizes + loop.ndim) - loop.sizes);
    const int64_t half = loop.sizes[d] / 2;
    launch_strided<F, T>(launch, part_of(loop, d, 0, half));
    launch_strided<F, T>(launch, part_of(loop, d, half, loop.sizes[d] - half));
    return;
  }
  if (loop.ndim > kWalkDims) {
    for (int64_t i = 0; i < loop.sizes[loop.ndim - 1]; ++i) {
      Loop part = part_of(loop, loop.ndim - 1, i, 1);
      --part.ndim;
      launch_strided<F, T>(launch, part);
    }
    return;
  }
  Walk walk;
  walk.numel = static_cast<uint32_t>(loop.numel);
  walk.ndim = loop.ndim;
  for (int d = 0; d < loop.ndim; ++d) walk.sizes[d] = Divider(loop.sizes[d]);
  for (int k = 0; k < loop.operands; ++k) {
    walk.data[k] = loop.data[k];
    std::copy_n(loop.strides[k], loop.ndim, walk.strides[k]);
  }
  launch(strided<F, T>, blocks_for(loop.numel, kThreads * kUnroll), kThreads, walk,
         static_cast<Compute<T>>(loop.parameter));
}

// ---- which of the two --------------------------------------------------------------------------------------------

template <class F, class T>
void run(const Launch& launch, const Loop& loop) {
  Pointers<F> pointers;
  bool packed = loop.ndim == 1;
  for (int k = 0; k < F::outputs + F::inputs; ++k) {
    pointers.data[k] = loop.data[k];
    packed = packed && loop.strides[k][0] == sizeof(T) && reinterpret_cast<uintptr_t>(loop.data[k]) % 16 == 0;
  }
  if (packed)
    launch(contiguous<F, T>, blocks_for(loop.numel, kThreads * Pack<T>::size), kThreads, pointers, loop.numel,
           static_cast<Compute<T>>(loop.parameter));
  else
    launch_strided<F, T>(launch, loop);
}

template <class F>
void run_column(const char* op, const Loop& loop) {
  const Launch launch(op, loop.device);
  with_type(loop.dtype, [&](auto zero) { run<F, decltype(zero)>(launch, loop); });
}

}  // namespace
}  // namespace cuda

void Cuda::elementwise(Kernel kernel, const Loop& loop) {
  if (loop.numel == 0) return;
  switch (kernel) {
#define COLUMN(which) \
  case Kernel::which: \
    return cuda::run_column<cuda::which>(#which, loop);
#define ROW(name, ...) COLUMN(name##_forward) COLUMN(name##_backward)
    TORCHBP_UNARY_GATES(ROW)
#undef ROW
#define ROW(name, ...) \
  COLUMN(name##_forward) COLUMN(name##_backward) COLUMN(name##_backward_a) COLUMN(name##_backward_b)
    TORCHBP_BINARY_GATES(ROW)
#undef ROW
#undef COLUMN
    case Kernel::count:
      break;
  }
}

}  // namespace torchbp
