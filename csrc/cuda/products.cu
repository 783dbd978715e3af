// Products with something done to them on the way out, by cuBLASLt: bias and ReLU on a layer's output, a ReLU's
// gradient on what reaches it, the bias gradient beside that of the weight. What it does not take goes PyTorch's way.
//
// Matrices are cuBLASLt's column-major ones: a row-major one is its transpose there.
#include <dlfcn.h>

#include <array>
#include <cstring>
#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define TORCHBP_LEVEL cuda
#include "../check.h"
#include "../columns.h"
#include "backend.h"
#include "cublaslt.h"
#include "launch.h"

namespace torchbp {
namespace cuda {
namespace {

using namespace cublaslt;
using torch::stable::Tensor;

// ---- the library -------------------------------------------------------------------------------------------------

// The address of a function in what torch has loaded; another copy would not know its handles.
void* find(const char* library, const char* function) {
#ifdef __CUDACC__
  for (const char* version : {".so.13", ".so.12"})
    if (void* const loaded = dlopen((std::string(library) + version).c_str(), RTLD_NOW | RTLD_NOLOAD))
      if (void* const found = dlsym(loaded, function)) return found;
  return nullptr;
#else
  return emulator::cublas(function);
#endif
}

// Null where it is not there.
const Library* library() {
  static const Library* const found = []() -> const Library* {
    static Library all;
    bool complete = true;
    const auto bind = [&](auto& function, const char* file, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(find(file, name));
      complete = complete && function;
    };
#define BIND(file, name) bind(all.name, file, #name)
    BIND("libcublasLt", cublasLtMatmulDescCreate);
    BIND("libcublasLt", cublasLtMatmulDescDestroy);
    BIND("libcublasLt", cublasLtMatmulDescSetAttribute);
    BIND("libcublasLt", cublasLtMatrixLayoutCreate);
    BIND("libcublasLt", cublasLtMatrixLayoutDestroy);
    BIND("libcublasLt", cublasLtMatmulPreferenceCreate);
    BIND("libcublasLt", cublasLtMatmulPreferenceDestroy);
    BIND("libcublasLt", cublasLtMatmulPreferenceSetAttribute);
    BIND("libcublasLt", cublasLtMatmulAlgoGetHeuristic);
    BIND("libcublasLt", cublasLtMatmul);
    BIND("libcublas", cublasGetMathMode);
#undef BIND
    return complete ? &all : nullptr;
  }();
  return found;
}

// A descriptor of the library's, destroyed at the end. Null where it cannot be made.
class Owned {
public:
  template <class Create, class... Arguments>
  Owned(Status (*destroy)(Descriptor), Create create, Arguments... arguments) : destroy_(destroy) {
    if (create(&descriptor_, arguments...) != 0) descriptor_ = nullptr;
  }
  Owned(const Owned&) = delete;
  ~Owned() {
    if (descriptor_) destroy_(descriptor_);
  }
  operator Descriptor() const { return descriptor_; }

private:
  Descriptor descriptor_ = nullptr;
  Status (*destroy_)(Descriptor);
};

// ---- a product ---------------------------------------------------------------------------------------------------

// d [m, n] = a b, column-major, where a is op(a) [m, k] and b is op(b) [k, n], and what the epilogue makes of it.
struct Product {
  Type type;
  Operation transpose_a, transpose_b;
  Epilogue epilogue;
  int64_t m, n, k, lda, ldb;
  const void *a, *b;
  void* d;       // of leading dimension m
  void* vector;  // the bias, or its gradient
  int32_t device;
  void* mask = nullptr;  // of ReLU's gradient: bit i + j * mask_leading for d[i, j]
  int64_t mask_leading = 0;
};

struct Plan {
  bool usable = false;
  Algorithm algorithm;
  size_t workspace = 0;
};

uint32_t bits_of(Type type, const void* value) {
  uint32_t bits = 0;
  std::memcpy(&bits, value, type == kFloat ? 4 : 2);
  return bits;
}

// Whether a value of a type is nan.
bool is_nan(Type type, const void* value) {
  const uint32_t bits = bits_of(type, value);
  const uint32_t infinity = type == kFloat ? 0x7F800000u : type == kHalf ? 0x7C00u : 0x7F80u;
  return (bits & (type == kFloat ? 0x7FFFFFFFu : 0x7FFFu)) > infinity;
}

// Runs a product; whether the library took it. An algorithm is looked for once for each kind of product.
class Runner {
public:
  Runner(const Library& lt, const Launch& launch, const Product& p)
      : lt_(lt),
        launch_(launch),
        p_(p),
        handle_(handle()),
        compute_(compute()),
        product_(lt.cublasLtMatmulDescDestroy, lt.cublasLtMatmulDescCreate, compute_, kFloat),
        a_(layout(p.transpose_a == kAsIs ? p.m : p.k, p.transpose_a == kAsIs ? p.k : p.m, p.lda)),
        b_(layout(p.transpose_b == kAsIs ? p.k : p.n, p.transpose_b == kAsIs ? p.n : p.k, p.ldb)),
        d_(layout(p.m, p.n, p.m)) {}

  bool run() { return prepare() && multiply(); }

  // The same in two: until multiply(), operands may be anything.
  bool prepare() {
    if (!product_ || !a_ || !b_ || !d_) return false;
    if (!set(kTransposeA, p_.transpose_a) || !set(kTransposeB, p_.transpose_b) || !set(kEpilogue, p_.epilogue) ||
        !set(kBiasPointer, p_.vector))
      return false;
    if (p_.mask && (!set(kMaskPointer, p_.mask) || !set(kMaskLeading, p_.mask_leading))) return false;
    plan_ = find_plan();
    return plan_.usable;
  }
  bool multiply() const { return multiply(plan_, p_.a) == 0; }

private:
  // PyTorch's for this thread and device, which serves as cuBLASLt's too.
  static Handle handle() {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
    return handle;
  }
  // PyTorch sets the handle's mode to what torch.backends.cuda.matmul allows.
  ComputeType compute() const {
    MathMode mode{};
    return p_.type == kFloat && lt_.cublasGetMathMode(handle_, &mode) == 0 && mode == kMathTF32 ? kComputeTF32
                                                                                                : kCompute32F;
  }
  Owned layout(int64_t rows, int64_t columns, int64_t leading) const {
    return Owned(lt_.cublasLtMatrixLayoutDestroy, lt_.cublasLtMatrixLayoutCreate, p_.type, static_cast<uint64_t>(rows),
                 static_cast<uint64_t>(columns), leading);
  }
  template <class T>
  bool set(ProductAttribute attribute, const T& value) const {
    return lt_.cublasLtMatmulDescSetAttribute(product_, attribute, &value, sizeof(value)) == 0;
  }

  Plan find_plan() {
    using Key = std::array<int64_t, 11>;
    static std::mutex mutex;
    static std::map<Key, Plan>& plans = *new std::map<Key, Plan>;  // never destroyed
    const Key key{p_.device, p_.type, compute_, p_.transpose_a, p_.transpose_b, p_.epilogue,
                  p_.m,      p_.n,    p_.k,     p_.lda,         p_.ldb};
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = plans.find(key); found != plans.end()) return found->second;
    const bool relu = p_.epilogue == kReluBias, gradient = p_.epilogue == kReluGradient;
    if ((relu || gradient) && launch_.capturing()) return {};  // what keeps_nan() and masks() wait for
    Plan plan = look_for_plan();
    if (plan.usable && relu) plan.usable = keeps_nan(plan);
    if (plan.usable && gradient) plan.usable = masks(plan);
    return plans[key] = plan;
  }

  Plan look_for_plan() const {
    const Owned preference(lt_.cublasLtMatmulPreferenceDestroy, lt_.cublasLtMatmulPreferenceCreate);
    const auto prefer = [&](PreferenceAttribute attribute, auto value) {
      return lt_.cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)) == 0;
    };
    // A Hopper's algorithms want up to 32 MiB (cuBLAS's own recommendation).
    if (!preference || !prefer(kMostWorkspace, uint64_t(32) << 20) || !prefer(kReductionSchemes, kReduceInComputeType))
      return {};
    for (const auto alignment : {kAlignmentA, kAlignmentB, kAlignmentC, kAlignmentD})
      if (!prefer(alignment, uint32_t(16))) return {};
    Heuristic best{};
    int found = 0;
    if (lt_.cublasLtMatmulAlgoGetHeuristic(handle_, product_, a_, b_, d_, d_, preference, 1, &best, &found) != 0 ||
        found == 0 || best.state != 0)
      return {};
    return {true, best.algorithm, best.workspace};
  }

  // NVIDIA calls its ReLU max(x, 0) and does not say what it makes of nan, which is never to be lost. So a new algorithm
  // gets a bias of nan to begin with.
  bool keeps_nan(const Plan& plan) {
    const int64_t element = p_.type == kFloat ? 4 : 2, checked = std::min<int64_t>(p_.m * p_.n, 1024);
    const Tensor bias = scratch(ScalarType::Byte, p_.m * element, p_.device);
    void* const nan = bias.mutable_data_ptr();
    launch_.check(cudaMemsetAsync(nan, 0xFF, p_.m * element, launch_.stream()));
    if (!set(kBiasPointer, nan) || multiply(plan, p_.a) != 0 || !set(kBiasPointer, p_.vector)) return false;
    std::vector<char> result(checked * element);
    launch_.check(cudaMemcpyAsync(result.data(), p_.d, result.size(), cudaMemcpyDeviceToHost, launch_.stream()));
    launch_.check(cudaStreamSynchronize(launch_.stream()));
    for (int64_t i = 0; i < checked; ++i)
      if (!is_nan(p_.type, result.data() + i * element)) return false;
    return true;
  }

  // Nor does it say where a mask has its bits, or what becomes of nan under a bit of 0, which has to be 0. So a new
  // algorithm gets weights of nan and a mask of random bits to begin with.
  bool masks(const Plan& plan) const {
    const int64_t element = p_.type == kFloat ? 4 : 2, checked = std::min<int64_t>(p_.n, 8),
                  weights = p_.m * p_.k * element;
    const Tensor weight = scratch(ScalarType::Byte, weights, p_.device);
    launch_.check(cudaMemsetAsync(weight.mutable_data_ptr(), 0xFF, weights, launch_.stream()));
    std::vector<uint8_t> bits(checked * p_.mask_leading / 8);
    uint32_t random = 1;
    for (uint8_t& byte : bits) byte = (random = random * 1664525u + 1013904223u) >> 24;  // Knuth and Lewis
    launch_.check(cudaMemcpyAsync(p_.mask, bits.data(), bits.size(), cudaMemcpyHostToDevice, launch_.stream()));
    if (multiply(plan, weight.const_data_ptr()) != 0) return false;
    std::vector<char> result(checked * p_.m * element);
    launch_.check(cudaMemcpyAsync(result.data(), p_.d, result.size(), cudaMemcpyDeviceToHost, launch_.stream()));
    launch_.check(cudaStreamSynchronize(launch_.stream()));
    for (int64_t j = 0; j < checked; ++j)
      for (int64_t i = 0; i < p_.m; ++i) {
        const int64_t bit = i + j * p_.mask_leading;
        const char* const value = result.data() + (i + j * p_.m) * element;
        const bool passes = bits[bit / 8] >> bit % 8 & 1;
        if (passes ? !is_nan(p_.type, value) : bits_of(p_.type, value) != 0) return false;
      }
    return true;
  }

  Status multiply(const Plan& plan, const void* a) const {
    const float one = 1, zero = 0;
    const Tensor workspace =
        scratch(ScalarType::Byte, std::max<int64_t>(static_cast<int64_t>(plan.workspace), 1), p_.device);
    return lt_.cublasLtMatmul(handle_, product_, &one, a, a_, p_.b, b_, &zero, p_.d, d_, p_.d, d_, &plan.algorithm,
                              workspace.mutable_data_ptr(), plan.workspace, launch_.stream());
  }

  const Library& lt_;
  const Launch& launch_;
  const Product& p_;
  const Handle handle_;
  const ComputeType compute_;
  const Owned product_, a_, b_, d_;
  Plan plan_;
};

// ---- the mask of ReLU's gradient ---------------------------------------------------------------------------------

// Of h [rows, columns], with `row_bytes` bytes to a row of the mask: bit i of byte j of a row is whether an upstream
// gradient of 1 at h[row, 8 j + i] is passed on. A thread reads 16 or 32 bytes of h for each byte.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_mask(const T* h, int64_t columns, uint8_t* mask, Divider row_bytes, uint32_t bytes) {
  using P = Pack<T>;
  for (int64_t k = thread_index(); k < bytes; k += thread_count()) {
    const uint32_t row = row_bytes.divide(static_cast<uint32_t>(k));
    const int64_t column = int64_t(8) * (static_cast<uint32_t>(k) - row * row_bytes.divisor);
    uint32_t bits = 0;
    if (column < columns) {
      const P* const from = reinterpret_cast<const P*>(h + row * columns + column);
#pragma unroll
      for (int i = 0; i < 8; i += P::size) {
        const P pack = from[i / P::size];
#pragma unroll
        for (int j = 0; j < P::size; ++j) {
          const Compute<T> in[2] = {1, load(pack.value[j])};
          Compute<T> out[1];
          relu_backward::apply(in, out, Compute<T>(0));
          bits |= static_cast<uint32_t>(out[0] != 0) << (i + j);
        }
      }
    }
    mask[k] = static_cast<uint8_t>(bits);
  }
}

// ---- which products ----------------------------------------------------------------------------------------------

// Whether a matrix is row-major without gaps, where 16 bytes can be read at a time, and neither empty nor of a dtype that
// has no epilogues.
bool has_epilogues(const Tensor& t) {
  return t.numel() > 0 && t.is_contiguous() && t.scalar_type() != ScalarType::Double &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 &&
         (t.size(t.dim() - 1) * static_cast<int64_t>(t.element_size())) % 16 == 0;
}

Type type_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? kFloat : t.scalar_type() == ScalarType::Half ? kHalf : kBFloat16;
}

}  // namespace
}  // namespace cuda

using cuda::has_epilogues;
using torch::stable::Tensor;

std::optional<Tensor> Cuda::affine_relu(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const cublaslt::Library* const lt = cuda::library();
  if (!lt || !has_epilogues(x) || !has_epilogues(weight) || !has_epilogues(bias)) return std::nullopt;
  const int64_t n = x.size(0), in = x.size(1), out = weight.size(0);
  const Tensor y = empty({n, out}, x.scalar_type(), x);
  const cuda::Launch launch("linear", x.get_device_index());
  // y^T [out, n] = W x^T
  const cuda::Product product{.type = cuda::type_of(x),
                              .transpose_a = cublaslt::kTransposed,
                              .transpose_b = cublaslt::kAsIs,
                              .epilogue = cublaslt::kReluBias,
                              .m = out,
                              .n = n,
                              .k = in,
                              .lda = in,
                              .ldb = in,
                              .a = weight.const_data_ptr(),
                              .b = x.const_data_ptr(),
                              .d = y.mutable_data_ptr(),
                              .vector = const_cast<void*>(bias.const_data_ptr()),
                              .device = x.get_device_index()};
  if (!cuda::Runner(*lt, launch, product).run()) return std::nullopt;
  return y;
}

// What this saves, counted for an H100 that reaches 3.0 TB/s and 650 TFLOP/s, and measured nowhere. Without it, ReLU's
// gradient reads the product and h and writes dz: 6 bytes an element in bfloat16. With it, the mask is made from h,
// written and read: 2.25 bytes. For n = 65,536 and a layer of as many inputs as outputs:
//
//                                            width 512     width 1024
//   dz W, and dW with the bias gradient      53 + 53       211 + 211 us
//   ReLU's gradient in a pass of its own     67            134 us
//   the mask                                 25            50 us
//   in all, before and now                   173, 131      556, 472 us    (24 % and 15 % less)
//
// The backward of three such layers, of which the first has no dx, takes 21 % and 13 % less; where the last one has 10
// outputs, whose rows are not aligned and so not taken, 12 % and 8 %. The gain is lost where the library has no
// algorithm with this epilogue that is as fast as one without, which only a GPU can tell.
//
// A mask written by the forward (RELU_AUX_BIAS) would save the 25 and 50 us as well, but is one more tensor to keep.
// DRELU_BGRAD sums dz over its rows too, which is had beside dW (BGRADB) already.
//
// NVIDIA describes the mask as a matrix of bits with a leading dimension divisible by 128; masks() finds out the rest.
std::optional<Tensor> Cuda::product_through_relu(const Tensor& dz, const Tensor& weight, const Tensor& h) {
  const cublaslt::Library* const lt = fused_relu_gradient ? cuda::library() : nullptr;
  if (!lt || !has_epilogues(dz) || !has_epilogues(weight) || !has_epilogues(h)) return std::nullopt;
  const int64_t n = dz.size(0), out = weight.size(0), in = weight.size(1), leading = (in + 127) / 128 * 128;
  const int64_t bytes = n * leading / 8;
  if (in % 8 != 0 || bytes > std::numeric_limits<int32_t>::max()) return std::nullopt;
  const int32_t device = dz.get_device_index();
  const Tensor dh = empty({n, in}, dz.scalar_type(), dz);
  const Tensor mask = cuda::scratch(ScalarType::Byte, bytes, device);
  const cuda::Launch launch("mlp_backward", device);
  // dh^T [in, n] = W^T dz^T
  const cuda::Product product{.type = cuda::type_of(dz),
                              .transpose_a = cublaslt::kAsIs,
                              .transpose_b = cublaslt::kAsIs,
                              .epilogue = cublaslt::kReluGradient,
                              .m = in,
                              .n = n,
                              .k = out,
                              .lda = in,
                              .ldb = out,
                              .a = weight.const_data_ptr(),
                              .b = dz.const_data_ptr(),
                              .d = dh.mutable_data_ptr(),
                              .vector = nullptr,
                              .device = device,
                              .mask = mask.mutable_data_ptr(),
                              .mask_leading = leading};
  cuda::Runner runner(*lt, launch, product);
  if (!runner.prepare()) return std::nullopt;
  cuda::with_type(h.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch(cuda::pack_mask<T>, cuda::blocks_for(bytes, cuda::kThreads), cuda::kThreads,
           static_cast<const T*>(h.const_data_ptr()), in, static_cast<uint8_t*>(mask.mutable_data_ptr()),
           cuda::Divider(leading / 8), static_cast<uint32_t>(bytes));
  });
  if (!runner.multiply()) return std::nullopt;
  return dh;
}

std::optional<std::array<Tensor, 2>> Cuda::weight_and_bias_gradient(const Tensor& dz, const Tensor& x) {
  const cublaslt::Library* const lt = cuda::library();
  if (!lt || !has_epilogues(dz) || !has_epilogues(x)) return std::nullopt;
  const int64_t n = x.size(0), in = x.size(1), out = dz.size(1);
  const Tensor dw = empty({out, in}, x.scalar_type(), x), db = empty({out}, x.scalar_type(), x);
  const cuda::Launch launch("linear_backward", x.get_device_index());
  // dW^T [in, out] = x^T dz; the sum over the rows of dz, which is B here
  const cuda::Product product{.type = cuda::type_of(x),
                              .transpose_a = cublaslt::kAsIs,
                              .transpose_b = cublaslt::kTransposed,
                              .epilogue = cublaslt::kBiasGradientB,
                              .m = in,
                              .n = out,
                              .k = n,
                              .lda = in,
                              .ldb = out,
                              .a = x.const_data_ptr(),
                              .b = dz.const_data_ptr(),
                              .d = dw.mutable_data_ptr(),
                              .vector = db.mutable_data_ptr(),
                              .device = x.get_device_index()};
  if (!cuda::Runner(*lt, launch, product).run()) return std::nullopt;
  return std::array<Tensor, 2>{dw, db};
}

}  // namespace torchbp
