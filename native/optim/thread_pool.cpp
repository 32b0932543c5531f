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
    if (getpid() != owner_) {  // a forked child: it has no workers, and nobody may release the locks
      return;
    }
    std::lock_guard in_use(in_use_);
    num_threads_.store(std::max<size_t>(1, num), std::memory_order_relaxed);
    stop_workers();
  }

  void run(size_t num_blocks, const Body& body) {
    if (std::min(num_blocks, num_threads()) <= 1 || getpid() != owner_) {
      return body(0, num_blocks);
    }
    std::unique_lock in_use(in_use_, std::try_to_lock);
    if (!in_use || !start_workers()) {
      return body(0, num_blocks);
    }
    Call call{.body = body, .num_blocks = num_blocks, .num_at_once = num_at_once(num_blocks)};
    {
      std::lock_guard lock(mutex_);
      call_ = &call;
    }
    start_.notify_all();
    call.take();
    std::unique_lock lock(mutex_);
    call_ = nullptr;  // workers that have not begun are not waited for
    finished_.wait(lock, [this] { return num_busy_ == 0; });
  }

 private:
  struct Call {
    const Body& body;
    const size_t num_blocks;
    const size_t num_at_once;
    std::atomic<size_t> next{0};

    void take() {
      for (;;) {
        const size_t begin = next.fetch_add(num_at_once, std::memory_order_relaxed);
        if (begin >= num_blocks) {
          return;
        }
        body(begin, std::min(begin + num_at_once, num_blocks));
      }
    }
    bool is_taken() const { return next.load(std::memory_order_relaxed) >= num_blocks; }
  };

  // Each thread takes blocks about four times: one that shares its CPU with compute takes fewer of them.
  size_t num_at_once(size_t num_blocks) const { return std::max<size_t>(1, num_blocks / (4 * num_threads())); }

  bool start_workers() {  // false: the system gives no threads
    const size_t num_workers = num_threads() - 1;
    try {
      while (workers_.size() < num_workers) {
        workers_.emplace_back([this] { work(); });
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

  void work() {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "ssd-kernel");  // so that tools, and our tests for leaks, know whose it is
#endif
    std::unique_lock lock(mutex_);
    for (;;) {
      start_.wait(lock, [this] { return stopping_ || (call_ != nullptr && !call_->is_taken()); });
      if (stopping_) {
        return;
      }
      Call& call = *call_;
      ++num_busy_;
      lock.unlock();
      call.take();
      lock.lock();
      if (--num_busy_ == 0) {
        finished_.notify_one();
      }
    }
  }

  const pid_t owner_ = getpid();
  // Half of the CPUs, since updates run beside compute. But at least two threads: on some CPUs one thread reaches only
  // half of the memory bandwidth, and while training waits for an update the other CPU is idle.
  std::atomic<size_t> num_threads_{std::max(std::min<size_t>(2, usable_cpus()), usable_cpus() / 2)};
  std::mutex in_use_;  // held by the call that uses the workers; guards workers_
  std::vector<std::thread> workers_;

  std::mutex mutex_;  // guards what follows
  std::condition_variable start_;
  std::condition_variable finished_;
  Call* call_ = nullptr;  // while there may be blocks to take
  size_t num_busy_ = 0;   // workers that are in it
  bool stopping_ = false;
};

// Never destroyed: to end threads at exit would race with what still runs, and would never return after a fork.
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
