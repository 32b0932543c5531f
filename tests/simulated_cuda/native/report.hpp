// What a run is told afterwards: races, failed kernels, and how often and why the host waited.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace simulated_cuda {

class Report {
 public:
  using Listener = std::function<void(const std::string&)>;

  void race(const std::string& what);
  void count(const std::string& what);
  void kernel_failed(const std::string& what);

  // The host is about to wait for the device. The device's mutex must not be held: the listener takes the GIL.
  void host_waits(const std::string& why);

  // Throws c10::Error if a kernel failed since the last call.
  void require_no_failure();

  void listen(Listener listener);
  std::vector<std::string> races() const;
  std::map<std::string, int64_t> counts() const;
  void clear();

 private:
  std::vector<std::string> races_, failures_;
  std::map<std::string, int64_t> counts_;
  Listener listener_;
};

Report& report();

}  // namespace simulated_cuda
