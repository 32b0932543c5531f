#include "io/bus_errors.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>

namespace lightning_ssd::io {

namespace {

// A range of addresses. The handler reads the list while other threads change it, so nodes are reused but never freed.
struct Node {
  std::atomic<uintptr_t> begin{0};  // 0: free
  std::atomic<uintptr_t> end{0};
  std::atomic<uintptr_t> failed_at{0};
  Node* next = nullptr;
};

std::atomic<Node*> first_node = nullptr;
std::mutex nodes_mutex;
std::atomic<void (*)()> notify_owner = nullptr;
struct sigaction action_before;

// Bytes that are replaced at once: a failing disk may take seconds for each page that is read.
constexpr size_t kReplacedNbytes = size_t{2} << 20;

// Calls only what a signal handler may call: system calls and memset.
bool replace(Node& node, uintptr_t address) {
  const auto page_nbytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t page = address / page_nbytes * page_nbytes;
  const size_t nbytes = std::min<size_t>(node.end.load() - page, kReplacedNbytes);
  const int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS;
  void* memory = mmap(reinterpret_cast<void*>(page), nbytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) return false;
  std::memset(memory, 0xFF, nbytes);
  node.failed_at.store(page);
  return true;
}

bool handle(const siginfo_t& info) {
  const auto address = reinterpret_cast<uintptr_t>(info.si_addr);
  if (info.si_code != BUS_ADRERR) return false;
  for (Node* node = first_node.load(); node != nullptr; node = node->next) {
    if (address < node->begin.load() || address >= node->end.load()) continue;
    return replace(*node, address);
  }
  return false;
}

void on_bus_error(int, siginfo_t* info, void*) {
  const int error = errno;
  if (handle(*info)) {
    notify_owner.load()();
  } else {
    sigaction(SIGBUS, &action_before, nullptr);  // the access is repeated, and that action handles the fault
  }
  errno = error;
}

Node* free_node() {
  for (Node* node = first_node.load(); node != nullptr; node = node->next) {
    if (node->begin.load() == 0) return node;
  }
  auto* node = new Node;
  node->next = first_node.load();
  first_node.store(node);
  return node;
}

}  // namespace

bool handle_bus_errors(void (*notify)()) {
  struct sigaction action{};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  struct sigaction before{};
  notify_owner.store(notify);
  if (sigaction(SIGBUS, &action, &before) != 0) return false;
  if (before.sa_sigaction != on_bus_error) action_before = before;
  return true;
}

uintptr_t watch_mapping(uintptr_t begin, size_t nbytes) {
  std::lock_guard lock(nodes_mutex);
  Node* node = free_node();
  node->failed_at.store(0);
  node->end.store(begin + nbytes);
  node->begin.store(begin);
  return reinterpret_cast<uintptr_t>(node);
}

void forget_mapping(uintptr_t watched) {
  std::lock_guard lock(nodes_mutex);
  auto* node = reinterpret_cast<Node*>(watched);
  node->begin.store(0);
  node->end.store(0);
}

std::optional<BusError> take_bus_error() {
  std::lock_guard lock(nodes_mutex);
  for (Node* node = first_node.load(); node != nullptr; node = node->next) {
    const uintptr_t failed_at = node->failed_at.exchange(0);
    const uintptr_t begin = node->begin.load();
    if (failed_at != 0 && begin != 0) return BusError{reinterpret_cast<uintptr_t>(node), failed_at - begin};
  }
  return std::nullopt;
}

}  // namespace lightning_ssd::io
