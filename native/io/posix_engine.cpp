// The portable native engine: a pool of threads, each with one blocking pread or pwrite at a time.
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "io/backlog.hpp"
#include "io/system.hpp"
#include "io/thread.hpp"

namespace lightning_ssd::io {

ssize_t System::transfer(const Attempt& attempt) {
  const auto offset = static_cast<off_t>(attempt.offset);
  const ssize_t result = attempt.direction == Direction::read
                             ? pread(attempt.fd, attempt.data, attempt.nbytes, offset)
                             : pwrite(attempt.fd, attempt.data, attempt.nbytes, offset);
  return result < 0 ? -errno : result;
}

namespace {

class PosixEngine final : public Engine {
 public:
  PosixEngine(size_t block_nbytes, size_t num_threads, std::unique_ptr<System> system)
      : backlog_(block_nbytes), system_(std::move(system)) {
    try {
      for (size_t i = 0; i < num_threads; ++i) threads_.push_back(start_thread("ssd-io", [this] { work(); }));
    } catch (...) {
      PosixEngine::close();  // else the destructor of a running thread would end the process
      throw;
    }
  }

  ~PosixEngine() override { PosixEngine::close(); }

  std::shared_ptr<Transfer> start(const Request& request) override { return backlog_.push(request); }
  Stats stats() const override { return backlog_.stats(); }
  bool register_memory(std::byte*, size_t) override { return false; }

  void close() override {
    backlog_.close();
    std::lock_guard lock(close_mutex_);
    for (auto& thread : threads_) thread.join();  // sync: waits for the disk
    threads_.clear();
  }

 private:
  void work() {
    while (auto piece = backlog_.wait_and_take()) {
      auto step = Piece::Step::again;
      while (step == Piece::Step::again || step == Piece::Step::busy) {
        if (step == Piece::Step::busy) std::this_thread::sleep_for(std::chrono::microseconds(100));
        step = piece->advance(system_->transfer(piece->attempt()));
      }
      backlog_.over(*piece, piece->error());
    }
  }

  Backlog backlog_;
  std::unique_ptr<System> system_;
  std::mutex close_mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Engine> make_posix_engine(size_t block_nbytes, size_t num_threads, std::unique_ptr<System> system) {
  return std::make_unique<PosixEngine>(block_nbytes, num_threads, std::move(system));
}

std::unique_ptr<Engine> make_posix_engine(size_t block_nbytes, size_t num_threads) {
  return make_posix_engine(block_nbytes, num_threads, std::make_unique<System>());
}

}  // namespace lightning_ssd::io
