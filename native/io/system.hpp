// The system calls of the posix engine. An interface, so that tests can shorten calls or let them fail.
#pragma once

#include <sys/types.h>

#include "io/piece.hpp"

namespace lightning_ssd::io {

class System {
 public:
  virtual ~System() = default;

  // One pread or pwrite; bytes moved, or a negative errno. Called from several threads.
  virtual ssize_t transfer(const Attempt& attempt);
};

}  // namespace lightning_ssd::io
