// Vector clocks: how much of each stream's work is known to have happened before some point.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace simulated_cuda {

using StreamId = int64_t;

inline constexpr StreamId kNumStreams = 16;  // the default stream, and a pool that is handed out in turns

class Clock {
 public:
  uint32_t& operator[](StreamId stream) { return ticks_[static_cast<size_t>(stream)]; }
  uint32_t operator[](StreamId stream) const { return ticks_[static_cast<size_t>(stream)]; }

  // What happened before `other` has happened before this, too.
  void join(const Clock& other) {
    for (size_t i = 0; i < ticks_.size(); ++i) ticks_[i] = std::max(ticks_[i], other.ticks_[i]);
  }

 private:
  std::array<uint32_t, kNumStreams> ticks_{};
};

}  // namespace simulated_cuda
