// Objects of C++ that Python knows by number.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace torchbp {

// One that is in use is kept alive by who uses it. One that is still open at the end of the program is never destroyed:
// what its tensors need is gone by then.
template <class T>
class Handles {
public:
  // before: the first one that is opened gets the number after this.
  explicit Handles(const char* what, int64_t before = 0) : what_(what), last_(before) {}

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
    typename Opened::node_type last;  // destroyed when the lock is gone
    const std::lock_guard<std::mutex> lock(mutex_);
    last = opened_.extract(number);
  }

private:
  using Opened = std::map<int64_t, std::shared_ptr<T>>;

  const char* what_;
  std::mutex mutex_;
  Opened& opened_ = *new Opened;
  int64_t last_;
};

}  // namespace torchbp
