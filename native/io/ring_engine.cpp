// The fast engine: one thread drives a ring with up to `depth` pieces in flight; callers only queue transfers.
#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "io/backlog.hpp"
#include "io/ring.hpp"
#include "io/thread.hpp"

namespace lightning_ssd::io {

namespace {

class RingEngine final : public Engine {
 public:
  RingEngine(size_t block_nbytes, size_t depth, std::unique_ptr<Ring> ring)
      : backlog_(block_nbytes), ring_(std::move(ring)), slots_(depth) {
    for (size_t slot = depth; slot > 0; --slot) free_slots_.push_back(slot - 1);
    thread_ = start_thread("ssd-io", [this] { drive(); });
  }

  ~RingEngine() override { RingEngine::close(); }

  std::shared_ptr<Transfer> start(const Request& request) override {
    auto transfer = backlog_.push(request);
    std::lock_guard lock(close_mutex_);
    if (ring_) ring_->wake();  // another thread may have closed the engine, which waited for this transfer
    return transfer;
  }

  Stats stats() const override { return backlog_.stats(); }

  bool register_memory(std::byte* data, size_t nbytes) override {
    std::lock_guard lock(close_mutex_);
    return ring_ && ring_->register_memory(data, nbytes);
  }

  void close() override {
    backlog_.close();
    std::lock_guard lock(close_mutex_);
    if (!thread_.joinable()) return;
    ring_->wake();
    thread_.join();  // sync: waits for the disk
    ring_.reset();   // closes its descriptors now, not with the last Python reference
  }

 private:
  bool idle() const { return free_slots_.size() == slots_.size(); }

  void drive() {
    for (;;) {
      fill_slots();
      if (idle() && backlog_.finished()) return;
      wait();
      while (auto completion = ring_->pop()) advance(completion->tag, completion->result);
    }
  }

  void fill_slots() {
    while (!free_slots_.empty()) {
      auto piece = backlog_.take();
      if (!piece) return;
      if (ring_error_ != 0) {
        backlog_.over(*piece, ring_error_);
        continue;
      }
      const size_t slot = free_slots_.back();
      free_slots_.pop_back();
      slots_[slot] = std::move(piece);
      ring_->push(slots_[slot]->attempt(), slot);
    }
  }

  void wait() {
    const int error = ring_->submit_and_wait();  // sync: waits for the disk, or for callers
    if (error == 0 || error == EINTR) return;
    // EAGAIN and EBUSY: the kernel is short of memory for a moment. Other errors are not expected; they become the
    // error of all attempts that were not submitted. Submitted ones still use their memory and stay in flight until
    // completed.
    if (error != EAGAIN && error != EBUSY) ring_error_ = error;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

  void advance(size_t slot, ssize_t result) {
    Piece& piece = *slots_[slot];
    const auto step = piece.advance(result);
    if (step == Piece::Step::again || step == Piece::Step::busy) {
      if (step == Piece::Step::busy) std::this_thread::sleep_for(std::chrono::microseconds(100));
      ring_->push(piece.attempt(), slot);
      return;
    }
    backlog_.over(piece, piece.error());
    slots_[slot].reset();
    free_slots_.push_back(slot);
  }

  Backlog backlog_;
  std::unique_ptr<Ring> ring_;
  // Only the driving thread uses what follows.
  std::vector<std::optional<Piece>> slots_;  // index is the tag
  std::vector<size_t> free_slots_;
  int ring_error_ = 0;
  std::mutex close_mutex_;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Engine> make_ring_engine(size_t block_nbytes, size_t depth, std::unique_ptr<Ring> ring) {
  return std::make_unique<RingEngine>(block_nbytes, depth, std::move(ring));
}

std::unique_ptr<Engine> make_uring_engine(size_t block_nbytes, size_t depth) {
  return make_ring_engine(block_nbytes, depth, make_uring_ring(static_cast<unsigned>(depth)));
}

}  // namespace lightning_ssd::io
