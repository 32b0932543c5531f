// Streams and events. Work is queued and done later: when the host waits for it, or by chance, in an order drawn from a
// seed among all orders that the events allow.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "clock.hpp"
#include "timing.hpp"

namespace simulated_cuda {

struct Range {  // of device memory
  char* begin;
  size_t nbytes;
};
using Ranges = std::vector<Range>;

struct Point {  // one recording of an event: the end of what a stream had queued
  StreamId stream = 0;
  bool is_done = false;
  Clock clock;
  Seconds done_at = 0;  // where the device takes time
};
using PointPtr = std::shared_ptr<Point>;

enum class Policy {
  mixed = 0,         // one of the next two, drawn at each wait
  late = 1,          // only what is waited for, and what that needs
  others_first = 2,  // everything else that can run, before what is waited for
  in_order = 3,      // at once, as on the CPU: no missing wait shows in values
};

// Guards all state of the device. Recursive: a kernel that runs under it allocates and frees memory.
std::recursive_mutex& device_mutex();

// Args:
//   seed: of the order of work.
//   policy: which orders are drawn.
//   progress: probability that some queued work runs whenever more is queued.
void configure(uint64_t seed, Policy policy, double progress);

bool is_in_kernel();  // whether this thread runs a kernel now
StreamId current_stream();
StreamId exchange_current_stream(StreamId stream);  // returns the one before
StreamId next_stream();                             // of the pool

// Queues a kernel that reads and writes these ranges; `run` does its work later, on the kernels' view of memory.
void enqueue(StreamId stream, const std::string& name, const Ranges& reads, const Ranges& writes,
             std::function<void()> run, const Cost& cost = {});

PointPtr record(StreamId stream);
void wait_on(StreamId stream, const PointPtr& point);  // what `stream` is given from now on runs after `point`
bool is_over(const PointPtr& point);                   // null points are; asking lets nothing run
bool query(const PointPtr& point);
bool is_idle(StreamId stream);

void synchronize(const PointPtr& point);
void synchronize_stream(StreamId stream);
void synchronize_device();

// Where the device takes time: the host goes on when `stream` has room for what it launches next.
void wait_for_room(StreamId stream);

size_t num_queued_kernels(StreamId stream);

// The host learned that `point` is done: what it does from now on comes after that.
void host_has_seen(const Point& point);

}  // namespace simulated_cuda
