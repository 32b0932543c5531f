// A device that takes time: each piece of work is over when its time has come, by what it costs and by what is before
// it on its stream and its engine. That is known when it is queued, so nothing runs meanwhile, and no core is used.
#pragma once

#include <array>
#include <cstddef>
#include <deque>
#include <map>
#include <string>
#include <vector>

namespace simulated_cuda {

using Seconds = double;  // since some point in the past

enum class Engine { compute = 0, to_device = 1, to_host = 2 };  // the device has one of each
inline constexpr size_t kNumEngines = 3;

struct Cost {
  Engine engine = Engine::compute;
  Seconds seconds = 0;
  size_t nbytes = 0;  // of a copy
};

struct Rates {            // per second
  double operations = 0;  // of a matrix product, two for each product of two numbers
  double memory = 0;      // bytes that kernels read and write
  double pinned = 0;      // bytes of a copy from or to pinned host memory
  double pageable = 0;
  Seconds launch = 0;  // what the shortest kernel takes
};

struct Span {  // of one engine's time
  std::string name;
  int engine;
  Seconds begin, end;
  size_t nbytes;
};

// Guarded by the device's mutex.
class Timing {
 public:
  // From now on work takes time; with `has_values` it is also done, by the host, when that waits for it.
  void begin(const Rates& rates, bool has_values);
  void end();

  bool is_on() const { return is_on_; }
  bool has_values() const { return has_values_; }

  Cost kernel(double operations, size_t nbytes) const;
  Cost copy(Engine engine, size_t nbytes, bool is_pinned) const;

  // Takes the first time after `since` when the engine has nothing else to do for so long; returns its end.
  Seconds reserve(const std::string& name, const Cost& cost, Seconds since);

  std::vector<Span> take_spans();

 private:
  bool is_on_ = false, has_values_ = true;
  Rates rates_;
  std::array<std::map<Seconds, Seconds>, kNumEngines> busy_;  // begin to end, of what is not over
  std::vector<Span> spans_;
};

Timing& timing();

Seconds now();
void sleep_until(Seconds time);

}  // namespace simulated_cuda
