#include "device_memory.hpp"

#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <set>
#include <utility>

#include "race_check.hpp"

namespace simulated_cuda {

namespace {

constexpr int kPoison = 0xFF;  // NaN in each floating dtype

struct Block {
  size_t nbytes;
  StreamId stream;
  std::set<StreamId> used_on;  // other streams
};

struct FreedBlock {  // waits for what other streams had queued
  char* begin;
  Block block;
  std::vector<PointPtr> points;
};

size_t capacity = size_t{1} << 30;
char *device_base = nullptr, *kernel_base = nullptr;
MemoryStats stats{};
std::map<char*, Block> live;
std::map<StreamId, std::map<char*, size_t>> free_ranges;
std::deque<FreedBlock> waiting;

void map_memory() {
  if (device_base) return;
  const int fd = memfd_create("simulated_cuda", MFD_CLOEXEC);
  TORCH_CHECK(fd >= 0 && ftruncate(fd, static_cast<off_t>(capacity)) == 0, "simulated CUDA: no memory");
  void* device = mmap(nullptr, capacity, PROT_NONE, MAP_SHARED, fd, 0);
  void* kernel = mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  TORCH_CHECK(device != MAP_FAILED && kernel != MAP_FAILED, "simulated CUDA: no memory");
  device_base = static_cast<char*>(device);
  kernel_base = static_cast<char*>(kernel);
  race_check().watch(device_base, capacity);
}

void add_free(StreamId stream, char* begin, size_t nbytes) {
  auto& ranges = free_ranges[stream];
  auto added = ranges.emplace(begin, nbytes).first;
  if (auto next = std::next(added); next != ranges.end() && begin + nbytes == next->first) {
    added->second += next->second;
    ranges.erase(next);
  }
  if (added == ranges.begin()) return;
  auto before = std::prev(added);
  if (before->first + before->second == added->first) {
    before->second += added->second;
    ranges.erase(added);
  }
}

void give_back(char* begin, const Block& block) {
  // What follows in the stream may write here: a kernel of another stream that still reads is found by the check.
  char* view = kernel_view(begin);
  enqueue(block.stream, "reuse of freed memory", {}, {{begin, block.nbytes}},
          [view, nbytes = block.nbytes] { std::memset(view, kPoison, nbytes); });
  add_free(block.stream, begin, block.nbytes);
}

void collect_waiting() {
  for (size_t left = waiting.size(); left > 0; --left) {
    FreedBlock freed = std::move(waiting.front());
    waiting.pop_front();
    bool is_over = true;
    for (const PointPtr& point : freed.points) is_over = is_over && simulated_cuda::is_over(point);
    if (!is_over) {
      waiting.push_back(std::move(freed));
      continue;
    }
    for (const PointPtr& point : freed.points) host_has_seen(*point);  // the allocator has queried it
    give_back(freed.begin, freed.block);
  }
}

char* take_free(StreamId stream, size_t nbytes) {
  auto& ranges = free_ranges[stream];
  for (auto it = ranges.begin(); it != ranges.end(); ++it) {
    if (it->second < nbytes) continue;
    const auto [begin, size] = *it;
    ranges.erase(it);
    if (size > nbytes) ranges.emplace(begin + nbytes, size - nbytes);
    return begin;
  }
  return nullptr;
}

char* reserve(size_t nbytes) {
  TORCH_CHECK(stats.reserved + nbytes <= capacity, "simulated CUDA out of memory: ", stats.reserved,
              " bytes are reserved, ", nbytes, " more were asked for, capacity is ", capacity);
  char* begin = device_base + stats.reserved;
  stats.reserved += nbytes;
  stats.peak_reserved = std::max(stats.peak_reserved, stats.reserved);
  if (timing().has_values()) std::memset(kernel_view(begin), kPoison, nbytes);
  return begin;
}

void* allocate(size_t nbytes) {
  std::lock_guard lock(device_mutex());
  map_memory();
  if (nbytes == 0) return nullptr;
  collect_waiting();
  const size_t size = (nbytes + kGrainNbytes - 1) / kGrainNbytes * kGrainNbytes;
  char* begin = take_free(current_stream(), size);
  if (!begin) begin = reserve(size);
  live[begin] = {size, current_stream(), {}};
  stats.allocated += size;
  stats.peak_allocated = std::max(stats.peak_allocated, stats.allocated);
  return begin;
}

void deallocate(void* address) {
  std::lock_guard lock(device_mutex());
  const auto it = live.find(static_cast<char*>(address));
  if (it == live.end()) return;
  const Block block = it->second;
  live.erase(it);
  stats.allocated -= block.nbytes;
  FreedBlock freed{static_cast<char*>(address), block, {}};
  for (StreamId stream : block.used_on) {
    if (stream != block.stream) freed.points.push_back(record(stream));
  }
  if (freed.points.empty()) return give_back(freed.begin, block);
  waiting.push_back(std::move(freed));
}

class DeviceAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    void* address = simulated_cuda::allocate(nbytes);
    return {address, address, &deallocate, c10::Device(c10::kCUDA, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &deallocate; }
  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "simulated CUDA: the host cannot copy device memory");
  }
};

}  // namespace

void set_capacity(size_t nbytes) {
  TORCH_CHECK(!device_base, "simulated CUDA: memory is in use, its capacity cannot change");
  capacity = nbytes;
}

char* kernel_view(const void* address) { return kernel_base + (static_cast<const char*>(address) - device_base); }

c10::Allocator* device_allocator() {
  static DeviceAllocator instance;
  return &instance;
}

void record_use(void* address, StreamId stream) {
  std::lock_guard lock(device_mutex());
  const auto it = live.find(static_cast<char*>(address));
  if (it != live.end()) it->second.used_on.insert(stream);
}

MemoryStats memory_stats() {
  std::lock_guard lock(device_mutex());
  return stats;
}

void reset_peak_memory() {
  std::lock_guard lock(device_mutex());
  stats.peak_allocated = stats.allocated;
  stats.peak_reserved = stats.reserved;
}

}  // namespace simulated_cuda
