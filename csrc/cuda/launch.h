// What every CUDA source shares: launching a kernel on the right device and stream, and picking it by dtype.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

#include "../dtype.h"
#include "../kernels.h"

namespace torchbp::cuda {

constexpr int kThreads = 256;  // of a block, where nothing speaks for another number

// What one thread moves at a time: 128 bits of a dtype, or another number of elements.
template <class T, int n = 16 / sizeof(T)>
struct alignas(n * sizeof(T)) Pack {
  static constexpr int size = n;
  T value[size];
};

// n / divisor for 0 <= n < 2^31 as a multiplication (Granlund and Montgomery 1994, figure 4.1): with
// shift = ceil(log2 divisor) and multiplier = floor(2^32 (2^shift - divisor) / divisor) + 1, the quotient is
// (n + high word of n * multiplier) >> shift.
struct Divider {
  uint32_t divisor, multiplier, shift;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(static_cast<uint32_t>(d)), shift(0) {
    while ((int64_t(1) << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d) / d + 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const { return (n + __umulhi(n, multiplier)) >> shift; }
};

// Blocks of `threads` threads for `items` pieces of work. A grid ends at 2^31 - 1 blocks; kernels step through the rest.
inline unsigned blocks_for(int64_t items, int64_t threads) {
  const int64_t most = std::numeric_limits<int32_t>::max();
  return static_cast<unsigned>(std::clamp<int64_t>((items + threads - 1) / threads, 1, most));
}

// The launches of one operation: makes `device` current while it lives, and raises, naming the operation, what CUDA
// reports.
class Launch {
public:
  Launch(const char* op, int32_t device) : op_(op), guard_(nullptr, aoti_torch_delete_cuda_guard) {
    CUDAGuardHandle guard = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &guard));
    guard_.reset(guard);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters>
  void operator()(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                  std::type_identity_t<Parameters>... arguments) const {
    with_shared(0, kernel, blocks, threads, arguments...);
  }

  // Each block has `bytes` of shared memory besides its static one: dynamic_shared().
  template <class... Parameters>
  void with_shared(size_t bytes, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                   std::type_identity_t<Parameters>... arguments) const {
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(blocks);
    launch.blockDim = dim3(threads);
    launch.dynamicSmemBytes = bytes;
    launch.stream = stream_;
    if (bytes > (48 << 10))  // as much as there is without asking
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)));
    check(cudaLaunchKernelEx(&launch, kernel, arguments...));
  }

  void check(cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, "torchbp::", op_, ": CUDA error: ", cudaGetErrorString(error));
  }

  cudaStream_t stream() const { return stream_; }

  // Whether what is launched becomes part of a CUDA graph, and nothing can be waited for.
  bool capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }

private:
  const char* op_;
  std::unique_ptr<CUDAGuardOpaque, decltype(&aoti_torch_delete_cuda_guard)> guard_;
  cudaStream_t stream_;
};

// Memory for one call, from PyTorch's caching allocator, which knows the stream and CUDA graphs.
inline torch::stable::Tensor scratch(ScalarType dtype, int64_t n, int32_t device) {
  return torch::stable::empty({n}, dtype, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
}

// Calls f with a value of the C++ type of a dtype. ops.h has refused every other dtype before.
template <class F>
void with_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(BFloat16());
    default:
      return f(Half());
  }
}

// The shared memory that a launch asked for, aligned to 16 bytes.
__device__ __forceinline__ void* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ uint4 memory[];
  return memory;
#else
  return emulator::dynamic_shared();
#endif
}

// This thread's place among all threads of the launch, and their number.
__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

}  // namespace torchbp::cuda
