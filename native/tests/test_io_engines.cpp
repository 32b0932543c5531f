// The native engines over system calls that come back short, busy, interrupted, empty or failed, as a script says.
//
// The bytes really move: a short result is a real, shorter call. So the tests check that every byte arrives where it
// belongs although calls did not do what they were asked to.
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <future>
#include <iterator>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "tests/io_support.hpp"

using namespace lightning_ssd::io;

namespace {

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

void fill(std::byte* data, size_t nbytes, std::mt19937& random) {
  for (size_t i = 0; i < nbytes; ++i) data[i] = static_cast<std::byte>(random());
}

// With any mix of short (aligned or not), busy and interrupted calls everything arrives, and nothing else is written.
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

// One call fails: the transfer fails with that error and the range of the piece, and the engine works on.
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
  CHECK(after->wait_for(60) && !after->failure());
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

// The times of a transfer that is in flight, of one that is queued behind it, and of both afterwards.
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

// Many threads start transfers, nobody waits, and the engine is closed: what it accepted completes, the rest is
// refused.
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
