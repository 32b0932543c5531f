// Binds the I/O engines; lightning_ssd/io/native_engines.py turns them into the package's Engine and Transfer.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <optional>
#include <system_error>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "io/bus_errors.hpp"
#include "io/engine.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace lightning_ssd::io;

namespace {

std::byte* at(uintptr_t address) { return reinterpret_cast<std::byte*>(address); }

// An engine and the process that has its threads. In a forked child the copy has no threads, and its locks may be held
// for ever. So the child leaks it: to destroy it would never return.
class OwnedEngine {
 public:
  explicit OwnedEngine(std::unique_ptr<Engine> engine) : engine_(std::move(engine)), owner_(getpid()) {}
  OwnedEngine(OwnedEngine&&) = default;
  ~OwnedEngine() {
    if (!is_mine()) engine_.release();
  }

  Engine& operator*() const { return *engine_; }

  void close() {
    if (is_mine()) engine_->close();
  }

 private:
  bool is_mine() const { return getpid() == owner_; }

  std::unique_ptr<Engine> engine_;
  pid_t owner_;
};

std::shared_ptr<Transfer> start(OwnedEngine& engine, bool is_write, int direct_fd, int tail_fd, uint64_t offset,
                                uintptr_t address, size_t nbytes) {
  return (*engine).start(
      {is_write ? Direction::write : Direction::read, direct_fd, tail_fd, offset, at(address), nbytes});
}

std::optional<std::tuple<int, uint64_t, size_t>> failure(const Transfer& transfer) {
  if (!transfer.done() || !transfer.failure()) return std::nullopt;
  const Failure failure = *transfer.failure();
  return std::make_tuple(failure.error, failure.offset, failure.nbytes);
}

std::optional<std::tuple<double, std::optional<double>>> times(const Transfer& transfer) {
  const auto times = transfer.times();
  if (!times) return std::nullopt;
  return std::make_tuple(times->begin_s, times->end_s);
}

auto stats(const OwnedEngine& engine) {
  const Stats stats = (*engine).stats();
  return std::make_tuple(stats.read_nbytes, stats.written_nbytes, stats.num_reads, stats.num_writes, stats.read_busy_s,
                         stats.write_busy_s);
}

// Path and `about` of each watched mapping, guarded by the interpreter's lock. Never destroyed: handlers may run until
// the process ends.
struct KnownMappings {
  std::unordered_map<uintptr_t, nb::object> about;
  nb::object raise;
};

KnownMappings& known_mappings() {
  static auto& known = *new KnownMappings;
  return known;
}

std::atomic<bool> is_called = false;

// Called by the main thread, with the interpreter's lock.
int raise_bus_error(void*) {
  is_called = false;
  std::optional<std::pair<nb::object, size_t>> first;
  while (const auto found = take_bus_error()) {
    const auto known = known_mappings().about.find(found->watched);
    if (!first && known != known_mappings().about.end()) first.emplace(known->second, found->offset);
  }
  if (!first) return 0;
  try {
    known_mappings().raise(first->first, first->second);
  } catch (nb::python_error& error) {
    error.restore();
    return -1;
  }
  return 0;
}

// Runs in the signal handler. An access to mapped memory raised the signal, so its thread holds no lock of Python.
void call_for_bus_errors() {
  if (!is_called.exchange(true) && Py_AddPendingCall(raise_bus_error, nullptr) != 0) is_called = false;
}

void raise_os_error(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const std::system_error& error) {
    PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
  }
}

}  // namespace

void bind_io(nb::module_& module) {
  nb::register_exception_translator(raise_os_error);
  using Release = nb::call_guard<nb::gil_scoped_release>;

  nb::class_<Transfer>(module, "IOTransfer", "One asynchronous operation; it completes whether or not anyone waits.")
      .def("done", &Transfer::done)
      .def("wait_for", &Transfer::wait_for, "seconds"_a, Release(), "Wait at most this long; returns done().")
      .def("failure", &failure, "(errno, offset, nbytes) of the first piece that failed, once done.")
      .def("times", &times, "(begin_s, end_s or None) of time.perf_counter; None while queued.");

  nb::class_<OwnedEngine>(module, "IOEngine", "Moves bytes between descriptors and memory; not usable after a fork.")
      .def("start", &start, "is_write"_a, "direct_fd"_a, "tail_fd"_a, "offset"_a, "address"_a, "nbytes"_a, Release())
      .def(
          "register_memory",
          [](OwnedEngine& engine, uintptr_t address, size_t nbytes) {
            return (*engine).register_memory(at(address), nbytes);
          },
          "address"_a, "nbytes"_a, Release(), "Pin memory once that most requests use; False where refused.")
      .def("stats", &stats, "The fields of IOStats, in order.")
      .def("close", &OwnedEngine::close, Release(), "Wait for what is in flight and end the threads.");

  module.def(
      "make_posix_engine",
      [](size_t block_nbytes, size_t num_threads) { return OwnedEngine(make_posix_engine(block_nbytes, num_threads)); },
      "block_nbytes"_a, "num_threads"_a);
  module.def(
      "make_uring_engine",
      [](size_t block_nbytes, size_t depth) { return OwnedEngine(make_uring_engine(block_nbytes, depth)); },
      "block_nbytes"_a, "depth"_a, "Raises OSError where io_uring is missing, forbidden or too old.");

  module.def(
      "handle_bus_errors",
      [](nb::object raise) {
        known_mappings().raise = std::move(raise);
        return handle_bus_errors(call_for_bus_errors);
      },
      "raise_"_a,
      "Where a watched mapping cannot be read it becomes NaN, and the main thread soon calls `raise_` with what is "
      "known "
      "of the mapping and the offset in it.");
  module.def(
      "watch_mapping",
      [](uintptr_t address, size_t nbytes, nb::object about) {
        const uintptr_t watched = watch_mapping(address, nbytes);
        known_mappings().about[watched] = std::move(about);
        return watched;
      },
      "address"_a, "nbytes"_a, "about"_a, "Returns what forget_mapping takes.");
  module.def(
      "forget_mapping",
      [](uintptr_t watched) {
        forget_mapping(watched);
        known_mappings().about.erase(watched);
      },
      "watched"_a);
}
