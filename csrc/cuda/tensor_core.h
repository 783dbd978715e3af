// What a warp does with a GPU's tensor cores: reads blocks of matrices of a half type from shared memory and multiplies
// them, with sums in float32.
//
// Of each matrix a lane holds a few numbers, its fragment, two of a half type in a register. With g = lane / 4 and
// t = lane % 4, a block of 8 x 8 gives a lane the numbers (g, 2 t) and (g, 2 t + 1). All 32 lanes make each call.
//
// The emulator (tests/cuda/on_cpu) does the same from the lanes' fragments. Products of half types are exact in float32;
// it adds them one after the other, where NVIDIA does not say in which order and how precisely hardware adds its sixteen.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../dtype.h"

namespace torchbp::cuda {

#ifndef __CUDACC__
// What the other lanes of the warp hold, from the first of the two calls to the second.
template <class T>
struct Lanes {
  explicit Lanes(const T* own) {
    emulator::of_warp()[threadIdx.x % 32] = reinterpret_cast<uintptr_t>(own);
    __syncwarp();
  }
  ~Lanes() { __syncwarp(); }
  const T* operator[](unsigned lane) const { return reinterpret_cast<const T*>(emulator::of_warp()[lane]); }
};
#endif

// Four blocks of 8 x 8 from shared memory: lane 8 b + r says where row r of block b is, 16 bytes that are aligned to 16.
// `transposed`: a lane gets its two numbers of each block's transpose.
template <bool transposed>
__device__ __forceinline__ void load_blocks(uint32_t (&to)[4], const void* row) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
#else
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(row) % 16 == 0, "emulator: a row of a block is not aligned");
  uint16_t own[8];  // read before any lane waits: as on a GPU, this call is no barrier
  std::memcpy(own, row, sizeof(own));
  const Lanes<uint16_t> rows(own);
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (unsigned b = 0; b < 4; ++b) {
    const uint16_t first = transposed ? rows[8 * b + 2 * t][g] : rows[8 * b + g][2 * t];
    const uint16_t second = transposed ? rows[8 * b + 2 * t + 1][g] : rows[8 * b + g][2 * t + 1];
    to[b] = first | static_cast<uint32_t>(second) << 16;
  }
#endif
}

// c [16, 8] += a [16, 16] b [16, 8]. The fragment of a is its four blocks, those on the left first; that of b is the
// transposes of its two blocks; that of c is the numbers (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const uint32_t registers[6] = {a[0], a[1], a[2], a[3], b0, b1};
  T halves[12];
  std::memcpy(halves, registers, sizeof(registers));
  float own[12];
  for (int i = 0; i < 12; ++i) own[i] = load(halves[i]);
  const Lanes<float> lanes(own);
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (unsigned j = 0; j < 4; ++j) {
    const unsigned below = j / 2, column = 2 * t + j % 2;  // of c: row g + 8 below
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned lane = k % 8 / 2, right = k / 8, odd = k % 2;
      c[j] += lanes[4 * g + lane][4 * right + 2 * below + odd] * lanes[4 * column + lane][8 + 2 * right + odd];
    }
  }
#endif
}

// A matrix in shared memory whose rows are `width` numbers of a half type. The packs of eight of row r are permuted by r,
// so that those of eight rows that stand in one column are in banks of their own.
template <class T, int width>
struct Tile {
  static_assert(width % 64 == 0);
  static constexpr int packs = width / 8;  // of a row
  T* data;

  __device__ __forceinline__ T* at(int row, int column) const {
    return data + row * width + ((column / 8) ^ (row % 8)) * 8 + column % 8;
  }
  __device__ __forceinline__ Tile from_row(int row) const { return {data + row * width}; }  // row: one of 8, 16, ...

  // For load_blocks: this lane's row of the 16 x 16 at (row, column), blocks one below the other first, or one beside the
  // other.
  __device__ __forceinline__ const T* down(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return at(row + lane % 16, column + lane / 16 * 8);
  }
  __device__ __forceinline__ const T* across(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return at(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8);
  }
};

}  // namespace torchbp::cuda
