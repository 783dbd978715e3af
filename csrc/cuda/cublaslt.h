// The part of cuBLASLt's C interface that products.cu calls, declared here: its header comes with the CUDA toolkit or
// cuBLAS's own package, of which torch needs neither to run. The library is torch's, found when it is first needed.
//
// Descriptors are opaque and made by the library; the numbers are those of cuBLASLt 13, the same since 11.4 (BGRADB).
#pragma once

#include <cstddef>
#include <cstdint>

namespace torchbp::cublaslt {

using Status = int;  // 0: all is well
using Handle = void*;
using Descriptor = void*;  // of a product, a matrix or a preference

enum Type : int { kFloat = 0, kHalf = 2, kBFloat16 = 14 };
enum ComputeType : int { kCompute32F = 68, kComputeTF32 = 77 };
enum MathMode : int { kMathTF32 = 3 };
enum Operation : int { kAsIs = 0, kTransposed = 1 };
enum Epilogue : uint32_t { kDefault = 1, kReluBias = 2 | 4, kReluGradient = 8 | 128, kBiasGradientB = 512 };
enum ProductAttribute : int {
  kTransposeA = 3,
  kTransposeB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kMaskPointer = 11,  // "EPILOGUE_AUX"
  kMaskLeading = 12   // int64_t, in bits
};
enum PreferenceAttribute : int {
  kMostWorkspace = 1,
  kReductionSchemes = 3,
  kAlignmentA = 5,
  kAlignmentB = 6,
  kAlignmentC = 7,
  kAlignmentD = 8
};
// How partial sums of a product that is cut along k are added up: not at all, or in the compute type.
constexpr uint32_t kReduceInComputeType = 2;

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

// The functions, by the names that the library has them under.
struct Library {
  Status (*cublasLtMatmulDescCreate)(Descriptor*, ComputeType, Type scale);
  Status (*cublasLtMatmulDescDestroy)(Descriptor);
  Status (*cublasLtMatmulDescSetAttribute)(Descriptor, ProductAttribute, const void*, size_t);
  Status (*cublasLtMatrixLayoutCreate)(Descriptor*, Type, uint64_t rows, uint64_t columns, int64_t leading);
  Status (*cublasLtMatrixLayoutDestroy)(Descriptor);
  Status (*cublasLtMatmulPreferenceCreate)(Descriptor*);
  Status (*cublasLtMatmulPreferenceDestroy)(Descriptor);
  Status (*cublasLtMatmulPreferenceSetAttribute)(Descriptor, PreferenceAttribute, const void*, size_t);
  Status (*cublasLtMatmulAlgoGetHeuristic)(Handle, Descriptor product, Descriptor a, Descriptor b, Descriptor c,
                                           Descriptor d, Descriptor preference, int wanted, Heuristic*, int* found);
  Status (*cublasLtMatmul)(Handle, Descriptor product, const void* alpha, const void* a, Descriptor, const void* b,
                           Descriptor, const void* beta, const void* c, Descriptor, void* d, Descriptor,
                           const Algorithm*, void* workspace, size_t workspace_size, void* stream);
  Status (*cublasGetMathMode)(Handle, MathMode*);
};

}  // namespace torchbp::cublaslt
