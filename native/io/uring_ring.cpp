// io_uring by raw system calls. No polling thread in the kernel, which would take a core from compute.
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>
#include <vector>

#include "io/ring.hpp"
#include "io/uring_abi.hpp"

namespace lightning_ssd::io {

namespace {

constexpr uint64_t kWakeTag = ~uint64_t{0};
constexpr size_t kSliceNbytes = size_t{1} << 30;  // the kernel's limit for one registered buffer

[[noreturn]] void fail(int error, const char* what) { throw std::system_error(error, std::generic_category(), what); }

class Descriptor {
 public:
  Descriptor(long fd, const char* what) : fd_(static_cast<int>(fd)) {
    if (fd < 0) fail(errno, what);
  }
  ~Descriptor() { ::close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

class Mapping {
 public:
  Mapping(int fd, uint64_t offset, size_t nbytes) : nbytes_(nbytes) {
    const int flags = MAP_SHARED | MAP_POPULATE;
    data_ = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, flags, fd, static_cast<off_t>(offset));
    if (data_ == MAP_FAILED) fail(errno, "mmap of io_uring");
    madvise(data_, nbytes, MADV_DONTFORK);  // a child must not see the parent's rings
  }
  ~Mapping() { munmap(data_, nbytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + offset);
  }

 private:
  void* data_;
  size_t nbytes_;
};

long setup(unsigned num_entries, uring::Params* params) {
  std::memset(params, 0, sizeof(*params));
  return syscall(uring::kSetupCall, num_entries, params);
}

size_t rings_nbytes(const uring::Params& params) {
  const size_t sq = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
  const size_t cq = params.cq_off.cqes + params.cq_entries * sizeof(uring::CompletionEntry);
  return std::max(sq, cq);
}

class UringRing final : public Ring {
 public:
  explicit UringRing(unsigned num_entries)
      : fd_(setup(num_entries + 1, &params_), "io_uring_setup"),  // one more for the wake-up
        wake_fd_(eventfd(0, EFD_CLOEXEC), "eventfd"),
        rings_((require_operations(), fd_.get()), uring::kOffsetOfRings, rings_nbytes(params_)),
        entries_(fd_.get(), uring::kOffsetOfEntries, params_.sq_entries * sizeof(uring::SubmissionEntry)) {
    arm_wake();
  }

  void push(const Attempt& attempt, uint64_t tag) override {
    const auto buffer = fixed_buffer(attempt.data, attempt.nbytes);
    const bool is_read = attempt.direction == Direction::read;
    uring::SubmissionEntry& entry = next_entry();
    entry.opcode =
        buffer ? (is_read ? uring::kReadFixed : uring::kWriteFixed) : (is_read ? uring::kRead : uring::kWrite);
    entry.fd = attempt.fd;
    entry.offset = attempt.offset;
    entry.address = reinterpret_cast<uint64_t>(attempt.data);
    entry.nbytes = static_cast<uint32_t>(attempt.nbytes);
    entry.user_data = tag;
    entry.buffer_index = buffer.value_or(0);
    publish_entry();
  }

  int submit_and_wait() override {
    const long result = syscall(uring::kEnterCall, fd_.get(), num_unsubmitted_, 1u, uring::kEnterGetEvents, nullptr, 0);
    if (result < 0) return errno;
    num_unsubmitted_ -= static_cast<uint32_t>(result);
    return 0;
  }

  std::optional<Completion> pop() override {
    for (;;) {
      auto& head = *rings_.at<uint32_t>(params_.cq_off.head);
      if (head == std::atomic_ref(*rings_.at<uint32_t>(params_.cq_off.tail)).load(std::memory_order_acquire)) {
        return std::nullopt;
      }
      const uint32_t index = head & *rings_.at<uint32_t>(params_.cq_off.ring_mask);
      const auto entry = rings_.at<uring::CompletionEntry>(params_.cq_off.cqes)[index];
      std::atomic_ref(head).store(head + 1, std::memory_order_release);
      if (entry.user_data != kWakeTag) return Completion{entry.user_data, entry.result};
      arm_wake();
    }
  }

  void wake() override {
    const uint64_t one = 1;
    while (::write(wake_fd_.get(), &one, sizeof(one)) < 0 && errno == EINTR) {
    }
  }

  bool register_memory(std::byte* data, size_t nbytes) override {
    // Before Linux 5.13 the call waits until nothing is in flight, but the read for wake-ups always is.
    if (!(params_.features & uring::kFeatureResourceTags)) return false;
    std::vector<iovec> slices;
    for (size_t start = 0; start < nbytes; start += kSliceNbytes) {
      slices.push_back({data + start, std::min(kSliceNbytes, nbytes - start)});
    }
    const auto num_slices = static_cast<unsigned>(slices.size());
    if (syscall(uring::kRegisterCall, fd_.get(), uring::kRegisterBuffers, slices.data(), num_slices) < 0) return false;
    fixed_nbytes_ = nbytes;
    fixed_data_.store(data, std::memory_order_release);
    return true;
  }

 private:
  // The operations read and write came with Linux 5.6, later than io_uring itself.
  void require_operations() const {
    uring::Probe probe{};
    const unsigned num_ops = sizeof(probe.ops) / sizeof(probe.ops[0]);
    if (syscall(uring::kRegisterCall, fd_.get(), uring::kRegisterProbe, &probe, num_ops) < 0)
      fail(errno, "io_uring probe");
    for (const auto op : {uring::kRead, uring::kWrite}) {
      if (op >= probe.num_ops || !(probe.ops[op].flags & uring::kProbeSupported))
        fail(ENOSYS, "io_uring read and write");
    }
    if (!(params_.features & uring::kFeatureSingleMmap)) fail(ENOSYS, "io_uring rings in one mapping");
  }

  void arm_wake() {
    uring::SubmissionEntry& entry = next_entry();
    entry.opcode = uring::kRead;
    entry.fd = wake_fd_.get();
    entry.address = reinterpret_cast<uint64_t>(&wake_count_);
    entry.nbytes = sizeof(wake_count_);
    entry.user_data = kWakeTag;
    publish_entry();
  }

  // There is always room: the ring has an entry for every attempt that may be in flight.
  uring::SubmissionEntry& next_entry() {
    const uint32_t index = *rings_.at<uint32_t>(params_.sq_off.tail) & *rings_.at<uint32_t>(params_.sq_off.ring_mask);
    rings_.at<uint32_t>(params_.sq_off.array)[index] = index;
    uring::SubmissionEntry& entry = entries_.at<uring::SubmissionEntry>(0)[index];
    entry = {};
    return entry;
  }

  void publish_entry() {
    auto& tail = *rings_.at<uint32_t>(params_.sq_off.tail);
    std::atomic_ref(tail).store(tail + 1, std::memory_order_release);
    num_unsubmitted_ += 1;
  }

  // Index of the registered slice that all the bytes are in, if there is one.
  std::optional<uint16_t> fixed_buffer(const std::byte* data, size_t nbytes) const {
    const std::byte* begin = fixed_data_.load(std::memory_order_acquire);
    if (begin == nullptr || data < begin || data + nbytes > begin + fixed_nbytes_) return std::nullopt;
    const auto start = static_cast<size_t>(data - begin);
    if (start / kSliceNbytes != (start + nbytes - 1) / kSliceNbytes) return std::nullopt;
    return static_cast<uint16_t>(start / kSliceNbytes);
  }

  uring::Params params_;
  Descriptor fd_;
  Descriptor wake_fd_;
  Mapping rings_;
  Mapping entries_;
  uint64_t wake_count_ = 0;  // the kernel puts here what the read for wake-ups returns
  uint32_t num_unsubmitted_ = 0;
  size_t fixed_nbytes_ = 0;
  std::atomic<std::byte*> fixed_data_ = nullptr;
};

}  // namespace

std::unique_ptr<Ring> make_uring_ring(unsigned num_entries) { return std::make_unique<UringRing>(num_entries); }

}  // namespace lightning_ssd::io
