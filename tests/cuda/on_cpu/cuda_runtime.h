// Stands in for CUDA's header of this name, so that a C++ compiler builds csrc/cuda for the CPU: the words of the
// language that the kernels use, and the calls of the runtime that the host code makes.
//
// The threads of a block are fibers (emulator.cpp): each runs until it has to wait for others, then the next one does.
// Which one is next is drawn at random, so that a missing __syncthreads() shows as a wrong result. Blocks run one after
// another. What this cannot tell: speed, and anything about memory that is not plain: alignment, caches, streams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks take turns

// ---- threads -----------------------------------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

struct Place {
  unsigned thread, block, threads, blocks;
};
const Place& place();

// Runs body() for every thread of every block. Raises if some threads of a block or of a warp wait for others that never
// come.
void run(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& body);

void wait_for_block();
void wait_for_warp(unsigned mask);
// Room for 8 bytes of each thread of this thread's warp.
uint64_t* of_warp();
// What the launch asked for; noise at first.
void* dynamic_shared();
// That a kernel may ask for more than 48 KiB of it, up to `bytes`.
void allow_shared(const void* kernel, size_t bytes);
void check_shared(const void* kernel, size_t bytes);
// A function of the cuBLAS of cublas.cpp.
void* cublas(const char* name);
// The copies that this thread has begun (cuda_pipeline.h): they take place when it waits for them.
void copy_later(void* to, const void* from, size_t size);
void copy_now();

}  // namespace emulator

// threadIdx and its like: x alone, read from the thread that runs.
template <unsigned emulator::Place::* field>
struct Index {
  struct X {
    operator unsigned() const { return emulator::place().*field; }
  } x;
};
inline constexpr Index<&emulator::Place::thread> threadIdx;
inline constexpr Index<&emulator::Place::block> blockIdx;
inline constexpr Index<&emulator::Place::threads> blockDim;
inline constexpr Index<&emulator::Place::blocks> gridDim;

inline void __syncthreads() { emulator::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { emulator::wait_for_warp(mask); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned lane = emulator::place().thread % 32;
  std::memcpy(&emulator::of_warp()[lane], &value, sizeof(T));
  emulator::wait_for_warp(mask);
  std::memcpy(&value, &emulator::of_warp()[lane ^ static_cast<unsigned>(other)], sizeof(T));
  emulator::wait_for_warp(mask);
  return value;
}

using std::max;  // as without a namespace on CUDA
using std::min;

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

template <class T>
T __ldcg(const T* at) {
  return *at;
}
inline void __threadfence() {}
inline void __threadfence_system() {}

// ---- the runtime -------------------------------------------------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "none: this is the emulator"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  emulator::check_shared(reinterpret_cast<const void*>(kernel), config->dynamicSmemBytes);
  emulator::run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}

constexpr int kMostShared = 232448;  // bytes of a block on an H100
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  emulator::allow_shared(kernel, bytes);
  return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = kMostShared;
  return cudaSuccess;
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t size, cudaStream_t) {
  std::memset(to, byte, size);
  return cudaSuccess;
}

enum { cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };
inline cudaError_t cudaHostAlloc(void** memory, size_t size, unsigned) {
  *memory = std::malloc(size);
  return cudaSuccess;
}
