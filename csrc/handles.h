// Objects of C++ that Python knows by number.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace torchbp {

// One that is in use is kept alive by who uses it.
template <class T>
class Handles {
public:
  explicit Handles(const char* what) : what_(what) {}

  int64_t open(std::shared_ptr<T> one) {
    const std::lock_guard<std::mutex> lock(mutex_);
    opened_.emplace(++last_, std::move(one));
    return last_;
  }

  std::shared_ptr<T> at(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = opened_.find(number);
    STD_TORCH_CHECK(found != opened_.end(), "torchbp::", what_, ": there is no ", what_, " ", number);
    return found->second;
  }

  void close(int64_t number) {
    std::shared_ptr<T> last;  // destroyed when the lock is gone
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = opened_.find(number);
    if (found == opened_.end()) return;
    last = std::move(found->second);
    opened_.erase(found);
  }

private:
  const char* what_;
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<T>> opened_;
  int64_t last_ = 0;
};

}  // namespace torchbp
