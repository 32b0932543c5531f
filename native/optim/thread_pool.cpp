#include "optim/thread_pool.hpp"

#include <pthread.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace lightning_ssd::optim {
namespace {

size_t usable_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return static_cast<size_t>(std::max(1, CPU_COUNT(&set)));
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

class ThreadPool {
 public:
  using Body = std::function<void(size_t, size_t)>;

  size_t num_threads() const { return num_threads_.load(std::memory_order_relaxed); }

  void set_num_threads(size_t num) {
    if (getpid() != owner_) {  // the workers are the parent's, its locks may be held by nobody
      return;
    }
    std::lock_guard in_use(in_use_);
    num_threads_.store(std::max<size_t>(1, num), std::memory_order_relaxed);
    stop_workers();
  }

  void run(size_t num_blocks, const Body& body) {
    const size_t num_parts = std::min(num_blocks, num_threads());
    if (num_parts <= 1 || getpid() != owner_) {
      return body(0, num_blocks);
    }
    std::unique_lock in_use(in_use_, std::try_to_lock);
    if (!in_use || !start_workers()) {
      return body(0, num_blocks);
    }
    {
      std::lock_guard lock(mutex_);
      body_ = &body;
      num_blocks_ = num_blocks;
      num_busy_ = workers_.size();
      ++round_;
    }
    start_.notify_all();
    run_part(0, workers_.size() + 1, num_blocks, body);
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [this] { return num_busy_ == 0; });
  }

 private:
  static void run_part(size_t part, size_t num_parts, size_t num_blocks, const Body& body) {
    const size_t begin = num_blocks * part / num_parts;
    const size_t end = num_blocks * (part + 1) / num_parts;
    if (begin < end) {
      body(begin, end);
    }
  }

  bool start_workers() {  // false: the system gives no threads
    const size_t num_workers = num_threads() - 1;
    try {
      while (workers_.size() < num_workers) {
        const size_t part = workers_.size() + 1;
        workers_.emplace_back([this, part, seen = round_] { work(part, seen); });
      }
    } catch (const std::system_error&) {
      stop_workers();
      return false;
    }
    return true;
  }

  void stop_workers() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    start_.notify_all();
    for (std::thread& worker : workers_) {
      worker.join();
    }
    workers_.clear();
    stopping_ = false;
  }

  void work(size_t part, size_t seen) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "ssd-kernel");  // so that tools, and our tests for leaks, know whose it is
#endif
    std::unique_lock lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return stopping_ || round_ != seen; });
      if (stopping_) {
        return;
      }
      seen = round_;
      const Body& body = *body_;
      const size_t num_blocks = num_blocks_;
      const size_t num_parts = workers_.size() + 1;
      lock.unlock();
      run_part(part, num_parts, num_blocks, body);
      lock.lock();
      if (--num_busy_ == 0) {
        finished_.notify_one();
      }
    }
  }

  const pid_t owner_ = getpid();
  // Updates run beside compute, which needs the rest; and memory, not arithmetic, bounds them.
  std::atomic<size_t> num_threads_{std::max<size_t>(1, usable_cpus() / 2)};
  std::mutex in_use_;  // held by the call that uses the workers; guards workers_
  std::vector<std::thread> workers_;

  std::mutex mutex_;  // guards what follows
  std::condition_variable start_;
  std::condition_variable finished_;
  const Body* body_ = nullptr;
  size_t num_blocks_ = 0;
  size_t num_busy_ = 0;
  size_t round_ = 0;  // number of the call, so that a worker runs its part once
  bool stopping_ = false;
};

// Never destroyed: ending threads while the process exits would race with whatever still runs, and hang after a fork.
ThreadPool& pool() {
  static ThreadPool* const instance = new ThreadPool;
  return *instance;
}

}  // namespace

size_t num_threads() { return pool().num_threads(); }

void set_num_threads(size_t num) { pool().set_num_threads(num); }

void parallel_for(size_t num_blocks, const std::function<void(size_t begin, size_t end)>& body) {
  pool().run(num_blocks, body);
}

}  // namespace lightning_ssd::optim
