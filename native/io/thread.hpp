// Threads of the engines.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace lightning_ssd::io {

// Starts a thread called `name` (at most 15 characters). It blocks asynchronous signals, so that a thread that handles
// them gets them, such as Python's main thread on Ctrl-C.
template <typename Body>
std::thread start_thread(const char* name, Body body) {
  sigset_t all, before;
  sigfillset(&all);
  for (const int synchronous : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, synchronous);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // inherited by the new thread
  struct Restore {
    const sigset_t& before;
    ~Restore() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
  } restore{before};
  std::thread thread(std::move(body));
  pthread_setname_np(thread.native_handle(), name);
  return thread;
}

}  // namespace lightning_ssd::io
