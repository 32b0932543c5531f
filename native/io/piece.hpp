// One piece of a transfer: its next system call, and what the result of that call means. Pure arithmetic.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "io/engine.hpp"

namespace lightning_ssd::io {

struct Attempt {  // one read or write call; sizes and offsets in bytes
  Direction direction;
  int fd;
  uint64_t offset;
  std::byte* data;
  size_t nbytes;
};

class Piece {
 public:
  enum class Step { done, again, busy, failed };  // busy: the same call again, after a pause

  // `start` and `nbytes` are relative to the transfer's request.
  Piece(std::shared_ptr<Transfer> transfer, size_t start, size_t nbytes);

  Attempt attempt() const;

  // Takes the result of the attempt's call: bytes moved, or a negative errno.
  Step advance(ssize_t result);

  const std::shared_ptr<Transfer>& transfer() const { return transfer_; }
  Failure failure(int error) const { return {error, offset_, nbytes_}; }
  int error() const { return error_; }

 private:
  std::shared_ptr<Transfer> transfer_;
  uint64_t offset_;
  std::byte* data_;
  size_t nbytes_;
  size_t body_nbytes_;  // bytes that go through direct_fd
  size_t moved_nbytes_ = 0;
  int error_ = 0;
};

}  // namespace lightning_ssd::io
