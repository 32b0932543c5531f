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
  int tail_fd;      // buffered; what lies past the last block boundary, and what a short transfer left unaligned
  uint64_t offset;  // multiple of kBlockNbytes
  std::byte* data;  // multiple of kBlockNbytes; owned by the caller until the transfer is done
  size_t nbytes;    // logical; a read may fill memory up to the next multiple of kBlockNbytes
};

struct Failure {  // of one piece of a transfer
  int error;      // errno
  uint64_t offset;
  size_t nbytes;
};

// Seconds of std::chrono::steady_clock, which on Linux is the clock of Python's time.perf_counter.
struct Times {
  double begin_s;               // the first piece was handed to the system
  std::optional<double> end_s;  // the last piece came back
};

struct Stats {  // of transfers that succeeded; see IOStats in Python
  uint64_t read_nbytes = 0;
  uint64_t written_nbytes = 0;
  uint64_t num_reads = 0;
  uint64_t num_writes = 0;
  double read_busy_s = 0;
  double write_busy_s = 0;
};

// One asynchronous operation. It completes whether or not anyone waits; the engine shares its ownership until then.
class Transfer {
 public:
  explicit Transfer(const Request& request) : request_(request) {}

  const Request& request() const noexcept { return request_; }
  bool done() const noexcept { return done_.load(std::memory_order_acquire); }

  // Waits until it is done, at most this long; returns done().
  bool wait_for(double seconds);

  // The first piece that failed; call once done.
  std::optional<Failure> failure() const { return failure_; }

  // When the disk worked on it; nothing while it is queued.
  std::optional<Times> times() const;

 private:
  friend class Backlog;
  void begin();
  void finish();

  const Request request_;
  // Both belong to the backlog's lock until the transfer is done.
  size_t num_pieces_in_flight_ = 0;
  std::optional<Failure> failure_;

  static constexpr double kNever = -1;
  std::atomic<double> begin_s_ = kNever;
  std::atomic<double> end_s_ = kNever;
  std::atomic<bool> done_ = false;
  std::mutex mutex_;
  std::condition_variable over_;
};

// Thread-safe. The threads stay with the parent of a fork: the child must neither use its copy nor destroy it.
class Engine {
 public:
  virtual ~Engine() = default;

  // Starts at once; throws std::invalid_argument when the engine is closed.
  virtual std::shared_ptr<Transfer> start(const Request& request) = 0;

  virtual Stats stats() const = 0;

  // Waits for everything in flight and ends the threads. A second call does nothing.
  virtual void close() = 0;

  // Tells the engine about memory that most requests will use, so that it need not be pinned for each of them.
  // At most once; the memory must outlive the engine. False where that is not possible: all works the same, slower.
  virtual bool register_memory(std::byte* data, size_t nbytes) = 0;
};

class System;  // see system.hpp: what tests replace
class Ring;    // see ring.hpp: what tests replace

// `num_threads` pieces in flight.
std::unique_ptr<Engine> make_posix_engine(size_t block_nbytes, size_t num_threads);
std::unique_ptr<Engine> make_posix_engine(size_t block_nbytes, size_t num_threads, std::unique_ptr<System> system);

// `depth` pieces in flight. Throws std::system_error where io_uring is missing, forbidden or too old.
std::unique_ptr<Engine> make_uring_engine(size_t block_nbytes, size_t depth);
std::unique_ptr<Engine> make_ring_engine(size_t block_nbytes, size_t depth, std::unique_ptr<Ring> ring);

}  // namespace lightning_ssd::io
