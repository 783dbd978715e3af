// The blocks of empty_in_block.
//
// A loop asks for the same sizes again and again. From 32 MiB on glibc maps each block afresh, and the system fills it
// with zeros before anybody writes to it: of relu of 64 MiB, forward and backward, that was 7 of 17 ms. Below that it
// hands out what has left the caches before what was freed last (1.5 times the time for 4 MiB), and what is at the end of
// the heap, as with glibc 2.36 every batch of a loader is in some processes, is given back to the system each time. So
// what is freed is kept here, as PyTorch's own allocator keeps it on a GPU.
#include "blocks.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#include "levels.h"

namespace torchbp {
namespace {

constexpr size_t kMiB = 1 << 20;
constexpr size_t kLine = 64;            // what data is aligned to; its size stands in the one before it
constexpr size_t kHugePage = 2 * kMiB;  // what blocks of many begin at, for the sake of expect_large (backend.cpp)
constexpr size_t kMostBlocks = 64;

// What is kept at most. A block that is larger never is.
size_t most_bytes() {
  static const size_t bytes = [] {
    const char* const mebibytes = std::getenv("TORCHBP_CACHE_MIB");
    return (mebibytes ? std::strtoull(mebibytes, nullptr, 10) : 256) * kMiB;
  }();
  return bytes;
}

size_t& size_of(char* data) { return *reinterpret_cast<size_t*>(data - kLine); }

// Blocks that nobody uses, the oldest first.
class Idle {
public:
  Idle() { blocks_.reserve(kMostBlocks + 1); }  // so that give does not throw, which frees a tensor

  // The block of a size that was given last: caches may still hold it.
  char* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = blocks_.size(); i-- > 0;) {
        if (size_of(blocks_[i]) == bytes) return remove(i);
      }
    }
    const size_t alignment = bytes < 16 * kHugePage ? kLine : kHugePage;
    void* const memory = std::aligned_alloc(alignment, (kLine + bytes + alignment - 1) / alignment * alignment);
    if (!memory) return nullptr;
    char* const data = static_cast<char*>(memory) + kLine;
    size_of(data) = bytes;
    return data;
  }

  void give(char* data) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks_.push_back(data);
      bytes_ += size_of(data);
    }
    keep_at_most(most_bytes(), kMostBlocks);
  }

  void keep_at_most(size_t bytes, size_t blocks) {
    while (char* const data = surplus(bytes, blocks)) std::free(data - kLine);
  }

private:
  char* surplus(size_t bytes, size_t blocks) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return blocks_.size() > blocks || bytes_ > bytes ? remove(0) : nullptr;
  }

  char* remove(size_t i) {
    char* const data = blocks_[i];
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
    bytes_ -= size_of(data);
    return data;
  }

  std::mutex mutex_;
  std::vector<char*> blocks_;
  size_t bytes_ = 0;
};

// Never destroyed: a tensor may outlive every static object.
Idle& idle() {
  static Idle* const one = new Idle;
  return *one;
}

}  // namespace

Tensor empty_in_block(Sizes sizes, const int64_t* strides, ScalarType dtype, const Tensor& like, size_t least) {
  int64_t numel = 1;
  for (const int64_t size : sizes) numel *= size;
  const size_t bytes = static_cast<size_t>(numel * element_size(dtype_index(dtype)));
  char* const block = bytes < least || bytes > most_bytes() ? nullptr : idle().take(bytes);
  if (!block)  // which says so if there is no memory
    return empty_strided(sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), like);
  return torch::stable::from_blob(block, sizes, {strides, sizes.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [](void* data) { idle().give(static_cast<char*>(data)); });
}

void empty_cache() {
  idle().keep_at_most(0, 0);
#if defined(__GLIBC__)
  malloc_trim(0);  // free() gives back to the system only what it has mapped, or what ends the heap
#endif
}

}  // namespace torchbp
