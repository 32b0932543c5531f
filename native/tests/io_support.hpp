// Engines over system calls that come back short, busy, interrupted, empty or failed, and memory and files for them.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "io/engine.hpp"
#include "io/ring.hpp"
#include "io/system.hpp"
#include "tests/check.hpp"

namespace lightning_ssd::io {

inline constexpr size_t kPieceNbytes = 4 * kBlockNbytes;
inline constexpr size_t kDepth = 3;  // most pieces in flight

// What one system call does.
struct Outcome {
  size_t at_most = ~size_t{0};  // moves at most so many bytes
  int error = 0;                // moves nothing and fails with this errno
  bool end_of_file = false;     // moves nothing and returns 0
};

// The outcome of each call, by its number. Checks that no more than kDepth calls are in flight.
class Script {
 public:
  explicit Script(std::function<Outcome(size_t)> outcome) : outcome_(std::move(outcome)) {}

  Outcome begin() {
    std::lock_guard lock(mutex_);
    CHECK(++num_in_flight_ <= kDepth);
    return outcome_(num_calls_++);
  }

  void end() {
    std::lock_guard lock(mutex_);
    num_in_flight_ -= 1;
  }

 private:
  std::mutex mutex_;
  size_t num_in_flight_ = 0;
  size_t num_calls_ = 0;
  std::function<Outcome(size_t)> outcome_;
};

// The result of a call that the engine's descriptor does not make, or nothing if the call is made.
// O_DIRECT refuses lengths off a block boundary, so a short result of such a length comes from a buffered descriptor.
inline std::optional<ssize_t> made_up(const Outcome& outcome, const Attempt& attempt) {
  if (outcome.error != 0) return -outcome.error;
  if (outcome.end_of_file) return 0;
  if (attempt.nbytes <= outcome.at_most || outcome.at_most % kBlockNbytes == 0) return std::nullopt;
  Attempt buffered = attempt;
  buffered.fd = open(("/proc/self/fd/" + std::to_string(attempt.fd)).c_str(), O_RDWR);
  buffered.nbytes = outcome.at_most;
  CHECK(buffered.fd >= 0);
  const ssize_t result = System().transfer(buffered);
  close(buffered.fd);
  return result;
}

inline Attempt shortened(const Outcome& outcome, const Attempt& attempt) {
  Attempt shorter = attempt;
  shorter.nbytes = std::min(attempt.nbytes, outcome.at_most);
  return shorter;
}

// The system calls of the posix engine, with the outcomes of a script.
class ScriptedSystem final : public System {
 public:
  explicit ScriptedSystem(std::shared_ptr<Script> script) : script_(std::move(script)) {}

  ssize_t transfer(const Attempt& attempt) override {
    const Outcome outcome = script_->begin();
    const auto made_up_result = made_up(outcome, attempt);
    const ssize_t result = made_up_result ? *made_up_result : System::transfer(shortened(outcome, attempt));
    script_->end();
    return result;
  }

 private:
  std::shared_ptr<Script> script_;
};

// A ring whose completions have the outcomes of a script; every seventh wait is interrupted.
class ScriptedRing final : public Ring {
 public:
  ScriptedRing(std::shared_ptr<Script> script, std::unique_ptr<Ring> real)
      : script_(std::move(script)), real_(std::move(real)) {}

  void push(const Attempt& attempt, uint64_t tag) override {
    const Outcome outcome = script_->begin();
    const auto result = made_up(outcome, attempt);
    if (!result) return real_->push(shortened(outcome, attempt), tag);
    made_up_.push_back({tag, *result});
    real_->wake();
  }

  std::optional<Completion> pop() override {
    std::optional<Completion> completion;
    if (made_up_.empty()) {
      completion = real_->pop();
    } else {
      completion = made_up_.front();
      made_up_.pop_front();
    }
    if (completion) script_->end();
    return completion;
  }

  int submit_and_wait() override { return num_enters_++ % 7 == 3 ? EINTR : real_->submit_and_wait(); }
  void wake() override { real_->wake(); }
  bool register_memory(std::byte* data, size_t nbytes) override { return real_->register_memory(data, nbytes); }

 private:
  std::shared_ptr<Script> script_;
  std::unique_ptr<Ring> real_;
  std::deque<Completion> made_up_;
  size_t num_enters_ = 0;
};

// A ring over blocking calls, for machines without io_uring. Completions come in the reverse order.
class BlockingRing final : public Ring {
 public:
  void push(const Attempt& attempt, uint64_t tag) override {
    std::lock_guard lock(mutex_);
    completions_.push_back({tag, System().transfer(attempt)});
  }

  int submit_and_wait() override {
    std::unique_lock lock(mutex_);
    woken_.wait(lock, [this] { return is_woken_ || !completions_.empty(); });
    is_woken_ = false;
    return 0;
  }

  std::optional<Completion> pop() override {
    std::lock_guard lock(mutex_);
    if (completions_.empty()) return std::nullopt;
    const Completion completion = completions_.back();
    completions_.pop_back();
    return completion;
  }

  void wake() override {
    std::lock_guard lock(mutex_);
    is_woken_ = true;
    woken_.notify_all();
  }

  bool register_memory(std::byte*, size_t) override { return false; }

 private:
  std::mutex mutex_;
  std::condition_variable woken_;
  bool is_woken_ = false;
  std::vector<Completion> completions_;
};

// Zeroed memory, page-aligned.
class Memory {
 public:
  explicit Memory(size_t nbytes) : nbytes_(nbytes) {
    void* data = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(data != MAP_FAILED);
    data_ = static_cast<std::byte*>(data);
  }
  Memory(const Memory&) = delete;
  ~Memory() { munmap(data_, nbytes_); }
  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
  size_t nbytes_;
};

// A file without a name, opened with O_DIRECT if the file system supports it.
class TestFile {
 public:
  explicit TestFile(size_t nbytes) {
    std::string path = "test_io_engines.XXXXXX";
    tail_fd_ = mkstemp(path.data());
    CHECK(tail_fd_ >= 0 && ftruncate(tail_fd_, static_cast<off_t>(nbytes)) == 0);
    direct_fd_ = open(path.c_str(), O_RDWR | O_DIRECT);
    if (direct_fd_ < 0) direct_fd_ = dup(tail_fd_);
    unlink(path.c_str());
  }
  TestFile(const TestFile&) = delete;
  ~TestFile() {
    close(tail_fd_);
    close(direct_fd_);
  }
  Request request(Direction direction, uint64_t offset, std::byte* data, size_t nbytes) const {
    return {direction, direct_fd_, tail_fd_, offset, data, nbytes};
  }
  int fd() const { return tail_fd_; }

 private:
  int tail_fd_;
  int direct_fd_;
};

}  // namespace lightning_ssd::io
