#include "host_memory.hpp"

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>

#include "streams.hpp"

namespace simulated_cuda {

namespace {

constexpr int kAlreadyRegistered = 712;  // cudaErrorHostMemoryAlreadyRegistered
constexpr int kNotRegistered = 713;      // cudaErrorHostMemoryNotRegistered
constexpr size_t kPage = 4096;

struct PinnedBlock {
  size_t num_copies = 0;
  bool is_freed = false;
};

std::map<char*, size_t> registered;
std::map<char*, PinnedBlock> pinned;

void free_pinned(void* address) {
  std::lock_guard lock(device_mutex());
  const auto it = pinned.find(static_cast<char*>(address));
  it->second.is_freed = true;
  if (it->second.num_copies > 0) return;
  pinned.erase(it);
  unregister_host(reinterpret_cast<uintptr_t>(address));
  std::free(address);
}

// The block of the pinned allocator that `address` lies in, or the end.
std::map<char*, PinnedBlock>::iterator find_pinned(const void* address) {
  auto it = registered.upper_bound(static_cast<char*>(const_cast<void*>(address)));
  return it == registered.begin() ? pinned.end() : pinned.find(std::prev(it)->first);
}

class PinnedAllocator final : public at::HostAllocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    const size_t size = std::max((nbytes + kPage - 1) / kPage, size_t{1}) * kPage;
    void* address = std::aligned_alloc(kPage, size);
    register_host(reinterpret_cast<uintptr_t>(address), size);
    std::lock_guard lock(device_mutex());
    pinned[static_cast<char*>(address)] = {};
    return {address, address, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t nbytes) const override { std::memcpy(to, from, nbytes); }
  bool record_event(void*, void*, c10::Stream) override { return false; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

}  // namespace

int register_host(uintptr_t address, size_t nbytes) {
  std::lock_guard lock(device_mutex());
  char* const begin = reinterpret_cast<char*>(address);
  for (const auto& [other, size] : registered) {
    if (other < begin + nbytes && begin < other + size) return kAlreadyRegistered;
  }
  registered[begin] = nbytes;
  return 0;
}

int unregister_host(uintptr_t address) {
  std::lock_guard lock(device_mutex());
  return registered.erase(reinterpret_cast<char*>(address)) ? 0 : kNotRegistered;
}

bool is_registered(const void* address, size_t nbytes) {
  std::lock_guard lock(device_mutex());
  char* const begin = static_cast<char*>(const_cast<void*>(address));
  auto it = registered.upper_bound(begin);
  if (it == registered.begin()) return false;
  --it;
  return begin + nbytes <= it->first + it->second;
}

at::HostAllocator* pinned_allocator() {
  static PinnedAllocator instance;
  return &instance;
}

void begin_host_copy(const void* address) {
  std::lock_guard lock(device_mutex());
  if (const auto it = find_pinned(address); it != pinned.end()) ++it->second.num_copies;
}

void end_host_copy(const void* address) {
  std::lock_guard lock(device_mutex());
  const auto it = find_pinned(address);
  if (it != pinned.end() && --it->second.num_copies == 0 && it->second.is_freed) free_pinned(it->first);
}

}  // namespace simulated_cuda
