// Both engines over system calls that come back short, busy, interrupted, empty or failed, as a script says.
//
// The bytes really move: a short result is a real, shorter call. So what is checked is that every byte arrived where it
// belongs although no call did what it was asked to.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "io/engine.hpp"
#include "io/ring.hpp"
#include "io/system.hpp"
#include "tests/check.hpp"

using namespace lightning_ssd::io;

namespace {

constexpr size_t kPieceNbytes = 4 * kBlockNbytes;
constexpr size_t kDepth = 3;  // pieces in flight

struct Outcome {                // of one call
  size_t at_most = ~size_t{0};  // bytes moved
  int error = 0;                // instead of moving anything
  bool end_of_file = false;     // likewise
};

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

// What the script makes of a call without the engine's own descriptor, or nothing if the call is to be made.
// O_DIRECT refuses lengths off a block boundary, so a result that ends there is had from a buffered descriptor.
std::optional<ssize_t> made_up(const Outcome& outcome, const Attempt& attempt) {
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

Attempt shortened(const Outcome& outcome, const Attempt& attempt) {
  Attempt shorter = attempt;
  shorter.nbytes = std::min(attempt.nbytes, outcome.at_most);
  return shorter;
}

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

// A ring over blocking calls: completions come in the reverse order. For machines without io_uring, and for that order.
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

using MakeEngine = std::function<std::unique_ptr<Engine>(std::function<Outcome(size_t)>)>;

std::unique_ptr<Engine> scripted_posix(std::function<Outcome(size_t)> outcome) {
  auto script = std::make_shared<Script>(std::move(outcome));
  return make_posix_engine(kPieceNbytes, kDepth, std::make_unique<ScriptedSystem>(script));
}

std::unique_ptr<Engine> scripted_blocking_ring(std::function<Outcome(size_t)> outcome) {
  auto script = std::make_shared<Script>(std::move(outcome));
  return make_ring_engine(kPieceNbytes, kDepth,
                          std::make_unique<ScriptedRing>(script, std::make_unique<BlockingRing>()));
}

std::unique_ptr<Engine> scripted_uring(std::function<Outcome(size_t)> outcome) {
  auto script = std::make_shared<Script>(std::move(outcome));
  return make_ring_engine(kPieceNbytes, kDepth, std::make_unique<ScriptedRing>(script, make_uring_ring(kDepth)));
}

bool has_uring() {
  try {
    make_uring_ring(1);
    return true;
  } catch (const std::system_error&) {
    return false;
  }
}

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

class TestFile {  // unlinked; direct where the file system allows it
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

void fill(std::byte* data, size_t nbytes, std::mt19937& random) {
  for (size_t i = 0; i < nbytes; ++i) data[i] = static_cast<std::byte>(random());
}

// Any mix of short (aligned or not), busy and interrupted calls: everything arrives, nothing else is touched.
void test_every_byte_arrives(const MakeEngine& make_engine, unsigned seed) {
  std::mt19937 random(seed);
  constexpr size_t kSizes[] = {1, 511, 4095, 4096, 4097, 5000, 16384, 16385, 70000, 131072};
  const Outcome kOutcomes[] = {{}, {4096}, {8192}, {512}, {1}, {5000}, {.error = EAGAIN}, {.error = EINTR}};
  auto engine = make_engine([&random, &kOutcomes](size_t) { return kOutcomes[random() % 8]; });
  for (const size_t nbytes : kSizes) {
    const uint64_t offset = kBlockNbytes * (nbytes % 3);
    const size_t num_room = nbytes + 2 * kBlockNbytes;
    Memory sent(num_room), received(num_room);
    std::mt19937 content(seed + static_cast<unsigned>(nbytes));
    fill(sent.data(), nbytes, content);
    TestFile file(offset + nbytes);
    engine->start(file.request(Direction::write, offset, sent.data(), nbytes))->wait_for(60);
    auto read = engine->start(file.request(Direction::read, offset, received.data(), nbytes));
    CHECK(read->wait_for(60) && !read->failure());
    CHECK(std::memcmp(sent.data(), received.data(), nbytes) == 0);
    CHECK(lseek(file.fd(), 0, SEEK_END) == static_cast<off_t>(offset + nbytes));
  }
  CHECK(engine->stats().num_reads == std::size(kSizes) && engine->stats().num_writes == std::size(kSizes));
}

// One call fails: the transfer fails with that error and the bounds of the piece, only when no piece is in flight.
void test_failure_names_the_piece(const MakeEngine& make_engine, Outcome bad, int expected_error) {
  constexpr size_t kNbytes = 8 * kPieceNbytes - 100;
  Memory memory(8 * kPieceNbytes);
  TestFile file(kNbytes);
  auto engine = make_engine([bad](size_t num_calls) { return num_calls == 4 ? bad : Outcome{}; });
  auto write = engine->start(file.request(Direction::write, 0, memory.data(), kNbytes));
  CHECK(write->wait_for(60) && write->failure());
  CHECK(write->failure()->error == expected_error);
  CHECK(write->failure()->offset % kPieceNbytes == 0 && write->failure()->nbytes <= kPieceNbytes);
  CHECK(engine->stats().num_writes == 0 && engine->stats().written_nbytes == 0);
  auto after = engine->start(file.request(Direction::write, 0, memory.data(), kNbytes));
  CHECK(after->wait_for(60) && !after->failure());  // the engine lives on
}

// A failed transfer is done only when none of its pieces can still touch the memory.
void test_failure_waits_for_pieces_in_flight() {
  Memory memory(4 * kPieceNbytes);
  TestFile file(4 * kPieceNbytes);
  std::mutex mutex;
  std::condition_variable changed;
  size_t num_begun = 0;
  bool is_released = false;
  class Gated final : public System {
   public:
    explicit Gated(std::function<void()> wait) : wait_(std::move(wait)) {}
    ssize_t transfer(const Attempt& attempt) override {
      if (attempt.offset == kPieceNbytes) return -EIO;
      wait_();
      return System::transfer(attempt);
    }

   private:
    std::function<void()> wait_;
  };
  auto gate = [&] {
    std::unique_lock lock(mutex);
    num_begun += 1;
    changed.notify_all();
    changed.wait(lock, [&] { return is_released; });
  };
  auto engine = make_posix_engine(kPieceNbytes, 2, std::make_unique<Gated>(gate));
  auto read = engine->start(file.request(Direction::read, 0, memory.data(), 4 * kPieceNbytes));
  {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return num_begun == 1; });  // the first piece; the second fails beside it
  }
  CHECK(!read->wait_for(0.05));
  {
    std::lock_guard lock(mutex);
    is_released = true;
    changed.notify_all();
  }
  CHECK(read->wait_for(60) && read->failure() && read->failure()->error == EIO);
  CHECK(read->failure()->offset == kPieceNbytes && num_begun == 1);  // the rest was never started
}

// One thread, the first transfer at a gate: what is known of it and of the one behind it, before and after.
void test_times() {
  Memory memory(kPieceNbytes);
  TestFile file(kPieceNbytes);
  std::promise<void> begun, released;
  class Gated final : public System {
   public:
    Gated(std::promise<void>& begun, std::future<void> released) : begun_(begun), released_(std::move(released)) {}
    ssize_t transfer(const Attempt& attempt) override {
      if (released_.valid()) {
        begun_.set_value();
        released_.get();
      }
      return System::transfer(attempt);
    }

   private:
    std::promise<void>& begun_;
    std::future<void> released_;
  };
  auto engine = make_posix_engine(kPieceNbytes, 1, std::make_unique<Gated>(begun, released.get_future()));
  auto first = engine->start(file.request(Direction::read, 0, memory.data(), kPieceNbytes));
  auto second = engine->start(file.request(Direction::read, 0, memory.data(), kPieceNbytes));
  begun.get_future().wait();
  CHECK(first->times() && !first->times()->end_s && !second->times());
  released.set_value();
  CHECK(second->wait_for(60) && first->done());
  CHECK(first->times()->begin_s <= *first->times()->end_s);
  CHECK(*first->times()->end_s <= second->times()->begin_s && second->times()->begin_s <= *second->times()->end_s);
}

void test_real_end_of_file(const MakeEngine& make_engine) {
  Memory memory(4 * kPieceNbytes);
  auto engine = make_engine([](size_t) { return Outcome{}; });
  for (const size_t there : {size_t{0}, size_t{100}, kBlockNbytes, 3 * kPieceNbytes - 1}) {
    TestFile file(there);
    auto read = engine->start(file.request(Direction::read, 0, memory.data(), 3 * kPieceNbytes));
    CHECK(read->wait_for(60) && read->failure() && read->failure()->error == EIO);
  }
}

// Nobody waits, many threads start, close comes in between: everything accepted is completed, the rest refused.
void test_close_completes_what_was_accepted(const MakeEngine& make_engine) {
  constexpr size_t kNumThreads = 4;
  constexpr size_t kNumEach = 50;
  constexpr size_t kNbytes = 3 * kPieceNbytes + 17;
  TestFile file(kNbytes);
  auto engine = make_engine([](size_t num_calls) { return num_calls % 5 ? Outcome{} : Outcome{.error = EAGAIN}; });
  std::deque<Memory> memories;
  for (size_t i = 0; i < kNumThreads; ++i) memories.emplace_back(kNumEach * 4 * kPieceNbytes);
  std::vector<std::vector<std::shared_ptr<Transfer>>> transfers(kNumThreads);
  std::atomic<size_t> num_refused = 0;
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kNumThreads; ++i) {
    threads.emplace_back([&, i] {
      for (size_t j = 0; j < kNumEach; ++j) {
        try {
          std::byte* data = memories[i].data() + j * 4 * kPieceNbytes;
          transfers[i].push_back(engine->start(file.request(Direction::read, 0, data, kNbytes)));
        } catch (const std::invalid_argument&) {
          num_refused += 1;
        }
      }
    });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  engine->close();
  engine->close();
  for (auto& thread : threads) thread.join();
  size_t num_done = 0;
  for (const auto& mine : transfers) {
    for (const auto& transfer : mine) {
      CHECK(transfer->done() && !transfer->failure());
      num_done += 1;
    }
  }
  CHECK(num_done + num_refused == kNumThreads * kNumEach && engine->stats().num_reads == num_done);
}

void test_registered_memory() {
  constexpr size_t kNbytes = 64 * kPieceNbytes;
  Memory registered(kNbytes), other(kNbytes);
  auto engine = make_uring_engine(kPieceNbytes, 4);
  if (!engine->register_memory(registered.data(), kNbytes)) return;  // refused: a limit of this machine
  CHECK(!engine->register_memory(other.data(), kNbytes));
  std::mt19937 random(7);
  fill(registered.data(), kNbytes, random);
  TestFile file(kNbytes - 5);
  CHECK(engine->start(file.request(Direction::write, 0, registered.data(), kNbytes - 5))->wait_for(60));
  CHECK(engine->start(file.request(Direction::read, 0, other.data(), kNbytes - 5))->wait_for(60));
  CHECK(std::memcmp(registered.data(), other.data(), kNbytes - 5) == 0);
  CHECK(engine->stats().num_reads == 1 && engine->stats().num_writes == 1);
}

}  // namespace

int main() {
  std::vector<MakeEngine> engines = {scripted_posix, scripted_blocking_ring};
  if (has_uring()) engines.push_back(scripted_uring);
  for (const auto& make_engine : engines) {
    for (unsigned seed = 0; seed < 20; ++seed) test_every_byte_arrives(make_engine, seed);
    test_failure_names_the_piece(make_engine, {.error = ENOSPC}, ENOSPC);
    test_failure_names_the_piece(make_engine, {.error = EIO}, EIO);
    test_failure_names_the_piece(make_engine, {.end_of_file = true}, EIO);
    test_real_end_of_file(make_engine);
    test_close_completes_what_was_accepted(make_engine);
  }
  test_failure_waits_for_pieces_in_flight();
  test_times();
  if (has_uring()) test_registered_memory();
  return 0;
}
