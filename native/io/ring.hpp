// A submission and completion ring. An interface, so that tests can shorten attempts or let them fail.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "io/piece.hpp"

namespace lightning_ssd::io {

struct Completion {
  uint64_t tag;    // as pushed
  ssize_t result;  // bytes moved, or a negative errno
};

// One thread drives the ring and calls all of this; wake() and register_memory() may be called by others.
class Ring {
 public:
  virtual ~Ring() = default;

  // Queues an attempt. The ring has room for the number of attempts in flight that it was created for.
  virtual void push(const Attempt& attempt, uint64_t tag) = 0;

  // Submits what was pushed and waits for a completion or a wake-up. Returns 0 or a positive errno.
  virtual int submit_and_wait() = 0;

  // The next completion, without waiting.
  virtual std::optional<Completion> pop() = 0;

  // Ends the current or the next submit_and_wait(). From any thread.
  virtual void wake() = 0;

  // See Engine::register_memory.
  virtual bool register_memory(std::byte* data, size_t nbytes) = 0;
};

// Over io_uring, for `num_entries` attempts. Throws std::system_error if io_uring is missing, forbidden or too old.
std::unique_ptr<Ring> make_uring_ring(unsigned num_entries);

}  // namespace lightning_ssd::io
