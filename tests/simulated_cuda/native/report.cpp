#include "report.hpp"

#include <c10/util/Exception.h>

#include <mutex>
#include <utility>

#include "streams.hpp"

namespace simulated_cuda {

namespace {

constexpr size_t kMaxRaces = 1000;  // one missing wait makes thousands

}  // namespace

Report& report() {
  static Report instance;
  return instance;
}

void Report::race(const std::string& what) {
  std::lock_guard lock(device_mutex());
  if (races_.size() < kMaxRaces) races_.push_back(what);
}

void Report::count(const std::string& what) {
  std::lock_guard lock(device_mutex());
  ++counts_[what];
}

void Report::kernel_failed(const std::string& what) {
  std::lock_guard lock(device_mutex());
  failures_.push_back(what);
}

void Report::host_waits(const std::string& why) {
  if (is_in_kernel()) return;
  Listener listener;
  {
    std::lock_guard lock(device_mutex());
    ++counts_["wait: " + why];
    listener = listener_;
  }
  if (listener) listener(why);
}

void Report::require_no_failure() {
  std::unique_lock lock(device_mutex());
  if (failures_.empty()) return;
  const std::string first = failures_.front();
  failures_.clear();
  lock.unlock();
  TORCH_CHECK(false, "simulated CUDA: a kernel failed: ", first);
}

void Report::listen(Listener listener) {
  std::lock_guard lock(device_mutex());
  listener_ = std::move(listener);
}

std::vector<std::string> Report::races() const {
  std::lock_guard lock(device_mutex());
  return races_;
}

std::map<std::string, int64_t> Report::counts() const {
  std::lock_guard lock(device_mutex());
  return counts_;
}

void Report::clear() {
  std::lock_guard lock(device_mutex());
  races_.clear();
  failures_.clear();
  counts_.clear();
}

}  // namespace simulated_cuda
