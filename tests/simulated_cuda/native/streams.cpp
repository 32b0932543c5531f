#include "streams.hpp"

#include <c10/util/Exception.h>

#include <deque>
#include <random>
#include <utility>

#include "dispatch.hpp"
#include "race_check.hpp"
#include "report.hpp"

namespace simulated_cuda {

namespace {

struct Work {
  enum class Kind { kernel, record, wait } kind;
  std::function<void()> run;
  PointPtr point;
  std::string name;

  bool is_ready() const { return kind != Kind::wait || point->is_done; }
};

struct Stream {
  std::deque<Work> queue;
  Clock clock;                   // of what it has been given
  Seconds free_at = 0;           // the end of that, where the device takes time
  std::deque<Seconds> launches;  // the ends of what is not over
};

constexpr size_t kMaxQueued = 20000;  // beyond that work runs, so that closures do not fill the memory
constexpr int kMaxBurst = 8;
constexpr size_t kMaxLaunches = 1024;  // as CUDA's

std::mt19937_64 rng{0};
Policy policy = Policy::mixed;
double progress_share = 0.1;
std::array<Stream, kNumStreams> streams;
Clock host_clock;  // one for all threads of the host

thread_local StreamId this_stream = 0;
thread_local bool in_kernel = false;

Stream& at(StreamId stream) { return streams.at(static_cast<size_t>(stream)); }

void run_kernel(const Work& work) {
  const bool was_in_kernel = std::exchange(in_kernel, true);
  try {
    const BelowAutograd guard;
    work.run();
  } catch (const c10::Error& error) {
    report().kernel_failed(work.name + ": " + error.what_without_backtrace());
  } catch (const std::exception& error) {
    report().kernel_failed(work.name + ": " + error.what());
  }
  in_kernel = was_in_kernel;
}

void run_head(StreamId stream) {
  Work work = std::move(at(stream).queue.front());
  at(stream).queue.pop_front();
  if (work.kind == Work::Kind::record) work.point->is_done = true;
  if (work.kind == Work::Kind::kernel) run_kernel(work);
}

bool has_ready(StreamId stream) { return !at(stream).queue.empty() && at(stream).queue.front().is_ready(); }

// One piece of work of any stream; false if none can run.
bool run_any() {
  std::vector<StreamId> ready;
  for (StreamId stream = 0; stream < kNumStreams; ++stream) {
    if (has_ready(stream)) ready.push_back(stream);
  }
  if (ready.empty()) return false;
  run_head(ready[rng() % ready.size()]);
  return true;
}

// One piece of work that `stream` needs to go on.
bool run_needed_by(StreamId stream) {
  for (StreamId hops = 0; hops < kNumStreams; ++hops) {
    if (at(stream).queue.empty()) return false;
    if (has_ready(stream)) {
      run_head(stream);
      return true;
    }
    stream = at(stream).queue.front().point->stream;
  }
  return false;
}

void run_others(StreamId but) {
  for (bool any = true; any;) {
    any = false;
    for (StreamId stream = 0; stream < kNumStreams; ++stream) {
      while (stream != but && has_ready(stream)) {
        run_head(stream);
        any = true;
      }
    }
  }
}

void run_until_done(const Point& point) {
  const Policy how = policy != Policy::mixed ? policy : (rng() % 2 ? Policy::late : Policy::others_first);
  if (how == Policy::others_first) run_others(point.stream);
  while (!point.is_done) {
    const bool ran = (how == Policy::late && run_needed_by(point.stream)) || run_any();
    TORCH_CHECK(ran, "simulated CUDA: the streams wait for each other");
  }
}

// Some queued work may run at any time.
void progress() {
  if (timing().is_on()) return;  // it runs when the host waits for it
  if (policy == Policy::in_order) {
    while (run_any()) {
    }
    return;
  }
  size_t num_queued = 0;
  for (const Stream& stream : streams) num_queued += stream.queue.size();
  const double share = num_queued > kMaxQueued ? 1 : progress_share;
  if (std::uniform_real_distribution<>()(rng) >= share) return;
  for (int left = 1 + static_cast<int>(rng() % kMaxBurst); left > 0 && run_any(); --left) {
  }
}

}  // namespace

std::recursive_mutex& device_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

void configure(uint64_t seed, Policy how, double share) {
  std::lock_guard lock(device_mutex());
  rng.seed(seed);
  policy = how;
  progress_share = share;
}

bool is_in_kernel() { return in_kernel; }
StreamId current_stream() { return this_stream; }
StreamId exchange_current_stream(StreamId stream) { return std::exchange(this_stream, stream); }

StreamId next_stream() {
  std::lock_guard lock(device_mutex());
  static StreamId last = 0;
  return last = last % (kNumStreams - 1) + 1;
}

void enqueue(StreamId id, const std::string& name, const Ranges& reads, const Ranges& writes, std::function<void()> run,
             const Cost& cost) {
  std::lock_guard lock(device_mutex());
  Stream& stream = at(id);
  if (timing().is_on()) {
    stream.free_at = timing().reserve(name, cost, std::max(stream.free_at, now()));
    if (cost.seconds > 0) stream.launches.push_back(stream.free_at);
  }
  if (!timing().has_values()) return;
  stream.clock.join(host_clock);
  ++stream.clock[id];
  race_check().begin(id, name);
  for (const Range& range : reads) race_check().read(id, stream.clock, range);
  for (const Range& range : writes) race_check().write(id, stream.clock, range);
  stream.queue.push_back({Work::Kind::kernel, std::move(run), nullptr, name});
  if (!in_kernel) progress();
}

PointPtr record(StreamId id) {
  std::lock_guard lock(device_mutex());
  Stream& stream = at(id);
  stream.clock.join(host_clock);
  auto point = std::make_shared<Point>(Point{id, !timing().has_values(), stream.clock, stream.free_at});
  if (!timing().has_values()) return point;
  stream.queue.push_back({Work::Kind::record, nullptr, point, ""});
  return point;
}

void wait_on(StreamId id, const PointPtr& point) {
  std::lock_guard lock(device_mutex());
  if (!point) return;  // of an event that was never recorded
  at(id).clock.join(point->clock);
  at(id).free_at = std::max(at(id).free_at, point->done_at);
  if (!timing().has_values()) return;
  at(id).queue.push_back({Work::Kind::wait, nullptr, point, ""});
}

void host_has_seen(const Point& point) {
  std::lock_guard lock(device_mutex());
  host_clock.join(point.clock);
}

bool is_over(const PointPtr& point) {
  std::lock_guard lock(device_mutex());
  return !point || (point->is_done && point->done_at <= now());
}

bool query(const PointPtr& point) {
  std::lock_guard lock(device_mutex());
  if (!point) return true;
  progress();
  if (timing().is_on() && point->done_at <= now()) run_until_done(*point);
  const bool is_seen = is_over(point);
  if (is_seen) host_has_seen(*point);
  return is_seen;
}

bool is_idle(StreamId stream) {
  std::lock_guard lock(device_mutex());
  progress();
  return timing().is_on() ? query(record(stream)) : at(stream).queue.empty();
}

void synchronize(const PointPtr& point) {
  {
    std::lock_guard lock(device_mutex());
    if (!point) return;
    if (!point->is_done) run_until_done(*point);
    host_has_seen(*point);
  }
  if (point->done_at > now()) sleep_until(point->done_at);
  report().require_no_failure();
}

void synchronize_stream(StreamId stream) { synchronize(record(stream)); }

void synchronize_device() {
  for (StreamId stream = 0; stream < kNumStreams; ++stream) synchronize_stream(stream);
}

void wait_for_room(StreamId id) {
  Seconds until = 0;
  {
    std::lock_guard lock(device_mutex());
    auto& launches = at(id).launches;
    while (!launches.empty() && launches.front() <= now()) launches.pop_front();
    if (launches.size() <= kMaxLaunches) return;
    until = launches[launches.size() - kMaxLaunches];
  }
  report().host_waits("launch");
  sleep_until(until);
}

size_t num_queued_kernels(StreamId stream) {
  std::lock_guard lock(device_mutex());
  size_t found = 0;
  for (const Work& work : at(stream).queue) found += work.kind == Work::Kind::kernel;
  return found;
}

}  // namespace simulated_cuda
