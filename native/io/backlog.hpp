// The transfers that an engine has accepted and not finished, cut into pieces as slots become free, and statistics.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>

#include "io/engine.hpp"
#include "io/piece.hpp"

namespace lightning_ssd::io {

class Meter {  // one direction
 public:
  using Clock = std::chrono::steady_clock;

  void start();
  void stop(size_t nbytes, bool ok);
  double busy_s() const;  // up to now
  uint64_t nbytes() const { return nbytes_; }
  uint64_t num_done() const { return num_done_; }

 private:
  uint64_t nbytes_ = 0;
  uint64_t num_done_ = 0;
  size_t num_in_flight_ = 0;
  std::chrono::duration<double> busy_{0};
  Clock::time_point busy_since_;
};

class Backlog {
 public:
  explicit Backlog(size_t block_nbytes) : block_nbytes_(block_nbytes) {}

  // Throws std::invalid_argument once closed.
  std::shared_ptr<Transfer> push(const Request& request);

  // The next piece in order of arrival, or nothing when there is none now.
  std::optional<Piece> take();

  // The same, but waits for one; nothing only when closed and empty.
  std::optional<Piece> wait_and_take();

  // Notes that a piece is over. With an error, the pieces of its transfer that were not taken yet never start.
  void over(const Piece& piece, int error);

  void close();
  bool finished() const;  // closed, and nothing left to take
  Stats stats() const;

 private:
  struct Work {
    std::shared_ptr<Transfer> transfer;
    size_t next_start;  // where its next piece begins
  };

  Piece take_front();
  bool waits(const Transfer& begun) const;  // whether pieces of it are still to be taken
  Meter& meter(Direction direction) { return direction == Direction::read ? reads_ : writes_; }

  const size_t block_nbytes_;
  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<Work> works_;
  bool closed_ = false;
  Meter reads_;
  Meter writes_;
};

}  // namespace lightning_ssd::io
