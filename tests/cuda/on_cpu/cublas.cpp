// Stands in for cuBLASLt: the products that csrc/cuda/products.cu asks for, as loops over what its descriptors say.
//
// Written from NVIDIA's documentation (cuBLAS 13, "cublasLtMatmul()" and "cublasLtEpilogue_t"). What it would refuse is an
// error here. A product of 24 rows has a ReLU that loses nan, and one of 40 rows a ReLU's gradient that lets it
// through where the mask is 0, and one of 48 rows a mask whose bits are the other way round: to be found out.
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <map>
#include <string>

#include "../../../csrc/cuda/cublaslt.h"
#include "cuda_runtime.h"

namespace {

using namespace torchbp::cublaslt;

struct Matrix {
  Type type;
  int64_t rows, columns, leading;
};
struct MatrixProduct {
  ComputeType compute;
  Operation transpose_a = kAsIs, transpose_b = kAsIs;
  Epilogue epilogue = kDefault;
  void* vector = nullptr;
  const uint8_t* mask = nullptr;
  int64_t mask_leading = 0;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t schemes = 7, alignment[4] = {256, 256, 256, 256};
};

template <class T>
T& as(Descriptor descriptor) {
  return *static_cast<T*>(descriptor);
}
template <class T>
Status destroy(Descriptor descriptor) {
  delete static_cast<T*>(descriptor);
  return 0;
}
template <class T>
Status assign(T& to, const void* value, size_t size) {
  STD_TORCH_CHECK(size == sizeof(T), "cublasLt: an attribute of ", sizeof(T), " bytes was given ", size);
  std::memcpy(&to, value, size);
  return 0;
}

Status create_product(Descriptor* to, ComputeType compute, Type scale) {
  STD_TORCH_CHECK(scale == kFloat && (compute == kCompute32F || compute == kComputeTF32));
  *to = new MatrixProduct{compute};
  return 0;
}
Status set_product(Descriptor product, ProductAttribute attribute, const void* value, size_t size) {
  auto& p = as<MatrixProduct>(product);
  switch (attribute) {
    case kTransposeA:
      return assign(p.transpose_a, value, size);
    case kTransposeB:
      return assign(p.transpose_b, value, size);
    case kEpilogue:
      return assign(p.epilogue, value, size);
    case kBiasPointer:
      return assign(p.vector, value, size);
    case kMaskPointer:
      return assign(p.mask, value, size);
    case kMaskLeading:
      return assign(p.mask_leading, value, size);
  }
  return 7;
}
Status create_matrix(Descriptor* to, Type type, uint64_t rows, uint64_t columns, int64_t leading) {
  STD_TORCH_CHECK(leading >= static_cast<int64_t>(rows), "cublasLt: columns overlap");
  *to = new Matrix{type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), leading};
  return 0;
}
Status create_preference(Descriptor* to) {
  *to = new Preference;
  return 0;
}
Status set_preference(Descriptor preference, PreferenceAttribute attribute, const void* value, size_t size) {
  auto& p = as<Preference>(preference);
  if (attribute == kMostWorkspace) return assign(p.workspace, value, size);
  if (attribute == kReductionSchemes) return assign(p.schemes, value, size);
  return assign(p.alignment[attribute - kAlignmentA], value, size);
}

constexpr size_t kWorkspace = 1000;

Status look(Handle, Descriptor product, Descriptor a, Descriptor b, Descriptor c, Descriptor d, Descriptor preference,
            int wanted, Heuristic* result, int* found) {
  STD_TORCH_CHECK(wanted == 1 && as<Preference>(preference).workspace >= kWorkspace);
  for (const Descriptor m : {a, b, c, d}) {
    const Matrix& matrix = as<Matrix>(m);
    STD_TORCH_CHECK(matrix.leading * (matrix.type == kFloat ? 4 : 2) % 16 == 0 || m == d || m == c);
  }
  const auto& p = as<MatrixProduct>(product);
  STD_TORCH_CHECK(p.epilogue != kReluGradient || (reinterpret_cast<uintptr_t>(p.mask) % 16 == 0 && p.mask &&
                                                  p.mask_leading % 128 == 0 && p.mask_leading >= as<Matrix>(d).rows));
  *result = {};
  result->algorithm.data[0] = 42;
  result->workspace = kWorkspace;
  *found = 1;
  return 0;
}

template <class T>
void multiply(const MatrixProduct& p, const T* a, const Matrix& of_a, const T* b, const Matrix& of_b, T* d,
              const Matrix& of_d) {
  const auto at = [](const T* x, const Matrix& of, Operation op, int64_t row, int64_t column) {
    return static_cast<float>(op == kAsIs ? x[row + column * of.leading] : x[column + row * of.leading]);
  };
  const auto size = [](const Matrix& of, Operation op) {
    return op == kAsIs ? std::pair(of.rows, of.columns) : std::pair(of.columns, of.rows);
  };
  const auto [m, k] = size(of_a, p.transpose_a);
  const auto [k_of_b, n] = size(of_b, p.transpose_b);
  STD_TORCH_CHECK(k == k_of_b && m == of_d.rows && n == of_d.columns, "cublasLt: the sizes do not agree");
  T* const vector = static_cast<T*>(p.vector);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += at(a, of_a, p.transpose_a, i, l) * at(b, of_b, p.transpose_b, l, j);
      if (p.epilogue == kReluBias) {
        sum += static_cast<float>(vector[i]);
        sum = m == 24 ? std::fmax(sum, 0.0) : sum < 0 ? 0 : sum;
      }
      if (p.epilogue == kReluGradient) {
        const int64_t bit = i + j * p.mask_leading;
        const int passes = p.mask[bit / 8] >> (m == 48 ? 7 - bit % 8 : bit % 8) & 1;
        sum = m == 40 ? sum * passes : passes ? sum : 0;
      }
      d[i + j * of_d.leading] = static_cast<T>(static_cast<float>(sum));
    }
    if (p.epilogue == kBiasGradientB) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += at(b, of_b, p.transpose_b, l, j);
      vector[j] = static_cast<T>(static_cast<float>(sum));
    }
  }
}

Status matmul(Handle, Descriptor product, const void* alpha, const void* a, Descriptor of_a, const void* b,
              Descriptor of_b, const void* beta, const void*, Descriptor, void* d, Descriptor of_d,
              const Algorithm* algorithm, void*, size_t workspace, void*) {
  STD_TORCH_CHECK(*static_cast<const float*>(alpha) == 1 && *static_cast<const float*>(beta) == 0);
  STD_TORCH_CHECK(algorithm->data[0] == 42 && workspace >= kWorkspace);
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    multiply(as<MatrixProduct>(product), static_cast<const T*>(a), as<Matrix>(of_a), static_cast<const T*>(b),
             as<Matrix>(of_b), static_cast<T*>(d), as<Matrix>(of_d));
  };
  const Type type = as<Matrix>(of_d).type;
  if (type == kFloat)
    with(float());
  else if (type == kHalf)
    with(torch::headeronly::Half());
  else
    with(torch::headeronly::BFloat16());
  return 0;
}

Status math_mode(Handle, MathMode* mode) {
  *mode = {};
  return 0;
}

}  // namespace

void* emulator::cublas(const char* name) {
  static const std::map<std::string, void*> functions{
      {"cublasLtMatmulDescCreate", reinterpret_cast<void*>(create_product)},
      {"cublasLtMatmulDescDestroy", reinterpret_cast<void*>(destroy<MatrixProduct>)},
      {"cublasLtMatmulDescSetAttribute", reinterpret_cast<void*>(set_product)},
      {"cublasLtMatrixLayoutCreate", reinterpret_cast<void*>(create_matrix)},
      {"cublasLtMatrixLayoutDestroy", reinterpret_cast<void*>(destroy<Matrix>)},
      {"cublasLtMatmulPreferenceCreate", reinterpret_cast<void*>(create_preference)},
      {"cublasLtMatmulPreferenceDestroy", reinterpret_cast<void*>(destroy<Preference>)},
      {"cublasLtMatmulPreferenceSetAttribute", reinterpret_cast<void*>(set_preference)},
      {"cublasLtMatmulAlgoGetHeuristic", reinterpret_cast<void*>(look)},
      {"cublasLtMatmul", reinterpret_cast<void*>(matmul)},
      {"cublasGetMathMode", reinterpret_cast<void*>(math_mode)},
  };
  const auto found = functions.find(name);
  return found == functions.end() ? nullptr : found->second;
}

AOTITorchError torch_get_current_cuda_blas_handle(void** handle) {
  *handle = nullptr;
  return AOTI_TORCH_SUCCESS;
}
