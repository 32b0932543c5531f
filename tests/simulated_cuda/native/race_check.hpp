// The happens-before check: of every two accesses to the same device memory of which one writes, events, waits of the
// host or the order of one stream must say which comes first.
#pragma once

#include <string>
#include <unordered_set>
#include <vector>

#include "streams.hpp"

namespace simulated_cuda {

// Memory is looked at in grains. The allocator's blocks begin at one, so two tensors share a grain only if they are
// views of one allocation.
inline constexpr size_t kGrainNbytes = 512;

class RaceCheck {
 public:
  // Memory of `nbytes` at `base` is checked from now on.
  void watch(char* base, size_t nbytes);

  // A kernel is given to `stream`: the next reads and writes there are its own.
  void begin(StreamId stream, const std::string& name);
  void read(StreamId stream, const Clock& now, const Range& range);
  void write(StreamId stream, const Clock& now, const Range& range);

 private:
  struct Grain {  // all zeros: never touched
    uint32_t written_at;
    uint8_t written_on;
    uint32_t read_at[kNumStreams];
  };

  template <class Visit>
  void each_grain(const Range& range, Visit visit);
  bool has_unseen_write(const Grain& grain, StreamId stream, const Clock& now) const;
  void report_write(const Grain& grain, StreamId stream, const char* verb) const;
  const std::string& name_of(StreamId stream, uint32_t tick) const;

  char* base_ = nullptr;
  Grain* grains_ = nullptr;
  std::unordered_set<std::string> names_;
  std::vector<const std::string*> kernels_[kNumStreams];  // by tick
};

RaceCheck& race_check();

}  // namespace simulated_cuda
