#include "io/backlog.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace lightning_ssd::io {

namespace {

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

bool Transfer::wait_for(double seconds) {
  if (done()) return true;
  std::unique_lock lock(mutex_);
  over_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return done(); });  // sync: waits for the disk
  return done();
}

std::optional<Times> Transfer::times() const {
  const double begin_s = begin_s_.load(), end_s = end_s_.load();
  if (begin_s == kNever) return std::nullopt;
  return Times{begin_s, end_s == kNever ? std::nullopt : std::optional(end_s)};
}

void Transfer::begin() { begin_s_.store(now_s()); }

void Transfer::finish() {
  end_s_.store(now_s());
  {
    std::lock_guard lock(mutex_);
    done_.store(true, std::memory_order_release);
  }
  over_.notify_all();
}

std::shared_ptr<Transfer> Backlog::push(const Request& request) {
  auto transfer = std::make_shared<Transfer>(request);
  std::lock_guard lock(mutex_);
  if (closed_) throw std::invalid_argument("the engine is closed");
  works_.push_back({transfer, 0});
  meter(request.direction).start();
  arrived_.notify_all();
  return transfer;
}

std::optional<Piece> Backlog::take() {
  std::lock_guard lock(mutex_);
  if (works_.empty()) return std::nullopt;
  return take_front();
}

std::optional<Piece> Backlog::wait_and_take() {
  std::unique_lock lock(mutex_);
  arrived_.wait(lock, [this] { return closed_ || !works_.empty(); });  // sync: waits for callers
  if (works_.empty()) return std::nullopt;
  return take_front();
}

void Backlog::over(const Piece& piece, int error) {
  std::lock_guard lock(mutex_);
  Transfer& transfer = *piece.transfer();
  if (error != 0) {
    if (!transfer.failure_) transfer.failure_ = piece.failure(error);
    if (waits(transfer)) works_.pop_front();
  }
  // Pieces in flight still use the memory, so a failed transfer too is done when the last of them is over.
  if (--transfer.num_pieces_in_flight_ > 0 || waits(transfer)) return;
  meter(transfer.request().direction).stop(transfer.request().nbytes, !transfer.failure_);
  transfer.finish();
}

void Backlog::close() {
  std::lock_guard lock(mutex_);
  closed_ = true;
  arrived_.notify_all();
}

bool Backlog::finished() const {
  std::lock_guard lock(mutex_);
  return closed_ && works_.empty();
}

Stats Backlog::stats() const {
  std::lock_guard lock(mutex_);
  return {reads_.nbytes(), writes_.nbytes(), reads_.num_done(), writes_.num_done(), reads_.busy_s(), writes_.busy_s()};
}

Piece Backlog::take_front() {
  Work& work = works_.front();
  const size_t nbytes = work.transfer->request().nbytes;
  const size_t piece_nbytes = std::min(block_nbytes_, nbytes - work.next_start);
  Piece piece(work.transfer, work.next_start, piece_nbytes);
  if (work.next_start == 0) work.transfer->begin();
  work.transfer->num_pieces_in_flight_ += 1;
  work.next_start += piece_nbytes;
  if (work.next_start == nbytes) works_.pop_front();
  return piece;
}

bool Backlog::waits(const Transfer& begun) const {
  // Pieces are taken from the front only, so of a transfer that has begun either it is at the front, or no piece waits.
  return !works_.empty() && works_.front().transfer.get() == &begun;
}

void Meter::start() {
  if (num_in_flight_++ == 0) busy_since_ = Clock::now();
}

void Meter::stop(size_t nbytes, bool ok) {
  if (--num_in_flight_ == 0) busy_ += Clock::now() - busy_since_;
  if (!ok) return;
  nbytes_ += nbytes;
  num_done_ += 1;
}

double Meter::busy_s() const {
  auto busy = busy_;
  if (num_in_flight_ > 0) busy += Clock::now() - busy_since_;
  return busy.count();
}

}  // namespace lightning_ssd::io
