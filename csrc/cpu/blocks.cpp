// The blocks of empty_in_block.
//
// With glibc 2.36, in some processes (what else lies on the heap decides) every batch is at the end of the heap, which is
// given back to the system each time: a fault for each of its pages, 7 times the work of the batch itself. Before 2.38
// glibc searched freed memory for an aligned block of the same size in vain, which would explain it.
#include "blocks.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#include "levels.h"

namespace torchbp {
namespace {

constexpr size_t kLine = 64;                            // what data is aligned to; its size stands in one before it
constexpr size_t kLeast = 128 << 10, kMost = 32 << 20;  // bytes of a block; malloc does well by the others
constexpr size_t kIdle = 64 << 20, kIdleBlocks = 4;     // kept at most: bytes, and blocks

size_t& size_of(char* data) { return *reinterpret_cast<size_t*>(data - kLine); }

class Idle {
public:
  Idle() { blocks_.reserve(kIdleBlocks + 1); }  // so that give does not throw, which frees a tensor

  char* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = blocks_.size(); i-- > 0;) {
        if (size_of(blocks_[i]) == bytes) return remove(i);
      }
    }
    void* const memory = std::aligned_alloc(kLine, (kLine + bytes + kLine - 1) / kLine * kLine);
    if (!memory) return nullptr;
    char* const data = static_cast<char*>(memory) + kLine;
    size_of(data) = bytes;
    return data;
  }

  void give(char* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(data);
    bytes_ += size_of(data);
    while (blocks_.size() > kIdleBlocks || bytes_ > kIdle) std::free(remove(0) - kLine);
  }

private:
  char* remove(size_t i) {
    char* const data = blocks_[i];
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
    bytes_ -= size_of(data);
    return data;
  }

  std::mutex mutex_;
  std::vector<char*> blocks_;  // the oldest first
  size_t bytes_ = 0;
};

// Never destroyed: a tensor may outlive every static object.
Idle& idle() {
  static Idle* const one = new Idle;
  return *one;
}

}  // namespace

Tensor empty_in_block(Sizes sizes, ScalarType dtype, const Tensor& like) {
  int64_t numel = 1;
  for (const int64_t size : sizes) numel *= size;
  const size_t bytes = static_cast<size_t>(numel * element_size(dtype_index(dtype)));
  char* const block = bytes < kLeast || bytes > kMost ? nullptr : idle().take(bytes);
  if (!block) return empty(sizes, dtype, like);  // which says so if there is no memory
  const auto strides = contiguous_strides(sizes);
  return torch::stable::from_blob(block, sizes, {strides.data(), sizes.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [](void* data) { idle().give(static_cast<char*>(data)); });
}

}  // namespace torchbp
