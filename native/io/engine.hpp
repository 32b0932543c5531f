// The contract of the native I/O engines: bytes between files and memory. No Python, no tensors.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

namespace lightning_ssd::io {

inline constexpr size_t kBlockNbytes = 4096;  // alignment of offsets, addresses and lengths under O_DIRECT

enum class Direction { read, write };

struct Request {  // sizes and offsets in bytes
  Direction direction;
  int direct_fd;    // whole blocks
  int tail_fd;      // buffered: bytes past the last block boundary, and the rest after a short, unaligned transfer
  uint64_t offset;  // multiple of kBlockNbytes
  std::byte* data;  // multiple of kBlockNbytes; owned by the caller until the transfer is done
  size_t nbytes;    // a read may fill memory up to the next multiple of kBlockNbytes
};

struct Failure {  // of one piece of a transfer
  int error;      // errno
  uint64_t offset;
  size_t nbytes;
};

// Seconds of std::chrono::steady_clock, which on Linux is the clock of Python's time.perf_counter.
struct Times {
  double begin_s;               // of the first piece
  std::optional<double> end_s;  // of the last piece
};

struct Stats {  // of transfers that succeeded; see IOStats in Python
  uint64_t read_nbytes = 0;
  uint64_t written_nbytes = 0;
  uint64_t num_reads = 0;
  uint64_t num_writes = 0;
  double read_busy_s = 0;
  double write_busy_s = 0;
};

// One asynchronous read or write. It completes whether or not anyone waits; the engine shares its ownership until then.
class Transfer {
 public:
  explicit Transfer(const Request& request) : request_(request) {}

  const Request& request() const noexcept { return request_; }
  bool done() const noexcept { return done_.load(std::memory_order_acquire); }

  // Waits until it is done, at most this long; returns done().
  bool wait_for(double seconds);

  // The first piece that failed; call once done.
  std::optional<Failure> failure() const { return failure_; }

  // When it was in flight; nothing while it is queued.
  std::optional<Times> times() const;

 private:
  friend class Backlog;
  void begin();
  void finish();

  const Request request_;
  // The backlog's lock guards both until the transfer is done.
  size_t num_pieces_in_flight_ = 0;
  std::optional<Failure> failure_;

  static constexpr double kNever = -1;
  std::atomic<double> begin_s_ = kNever;
  std::atomic<double> end_s_ = kNever;
  std::atomic<bool> done_ = false;
  std::mutex mutex_;
  std::condition_variable over_;
};

// Thread-safe. A forked child has no threads of it and must neither use nor destroy its copy.
class Engine {
 public:
  virtual ~Engine() = default;

  // Starts a transfer and returns at once; throws std::invalid_argument if the engine is closed.
  virtual std::shared_ptr<Transfer> start(const Request& request) = 0;

  virtual Stats stats() const = 0;

  // Waits for everything in flight and ends the threads. A second call does nothing.
  virtual void close() = 0;

  // Pins memory that most requests use, once instead of for each request. At most once; the memory must outlive the
  // engine. Returns false if that is not possible: all works the same, with more CPU time.
  virtual bool register_memory(std::byte* data, size_t nbytes) = 0;
};

class System;  // system.hpp; tests replace it
class Ring;    // ring.hpp; tests replace it

// At most `num_threads` pieces are in flight.
std::unique_ptr<Engine> make_posix_engine(size_t block_nbytes, size_t num_threads);
std::unique_ptr<Engine> make_posix_engine(size_t block_nbytes, size_t num_threads, std::unique_ptr<System> system);

// At most `depth` pieces are in flight. Throws std::system_error if io_uring is missing, forbidden or too old.
std::unique_ptr<Engine> make_uring_engine(size_t block_nbytes, size_t depth);
std::unique_ptr<Engine> make_ring_engine(size_t block_nbytes, size_t depth, std::unique_ptr<Ring> ring);

}  // namespace lightning_ssd::io
