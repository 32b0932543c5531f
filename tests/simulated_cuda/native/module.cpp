// The Python module: what the device, streams, events and the tests' report offer.
#include <ATen/Context.h>
#include <c10/core/Allocator.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "device_memory.hpp"
#include "host_memory.hpp"
#include "report.hpp"
#include "streams.hpp"

namespace simulated_cuda {

namespace {

namespace py = pybind11;
using Release = py::call_guard<py::gil_scoped_release>;  // a thread that waits for the device's mutex has no GIL

class Event {
 public:
  void record(StreamId stream) { point_ = simulated_cuda::record(stream); }
  void wait(StreamId stream) const { wait_on(stream, point_); }
  bool query() const { return simulated_cuda::query(point_); }
  Seconds done_at() const { return point_ ? point_->done_at : 0; }
  bool is_done() const { return is_over(point_); }
  void synchronize() const {
    report().host_waits("event");
    simulated_cuda::synchronize(point_);
  }

 private:
  PointPtr point_;
};

void listen(const py::object& function) {
  if (function.is_none()) return report().listen(nullptr);
  // The last reference may go in a thread without the GIL.
  const std::shared_ptr<py::object> held(new py::object(function), [](py::object* object) {
    const py::gil_scoped_acquire gil;
    delete object;
  });
  report().listen([held](const std::string& why) {
    const py::gil_scoped_acquire gil;
    (*held)(why);
  });
}

void define_streams(py::module_& m) {
  py::class_<Event>(m, "Event")
      .def(py::init<>())
      .def("_record", &Event::record, Release())
      .def("_wait", &Event::wait, Release())
      .def("query", &Event::query, Release())
      .def("synchronize", &Event::synchronize, Release())
      .def("done_at", &Event::done_at, "Where the device takes time, in seconds of time.monotonic().")
      .def("is_done", &Event::is_done, Release(), "Whether it is reached; asking lets nothing run.");
  m.def(
      "configure",
      [](uint64_t seed, int policy, double progress) { configure(seed, static_cast<Policy>(policy), progress); },
      py::arg("seed"), py::arg("policy"), py::arg("progress"), Release());
  m.def("next_stream", next_stream, Release());
  m.def("current_stream", current_stream);
  m.def("exchange_current_stream", exchange_current_stream);
  m.def("is_idle", is_idle, Release());
  m.def("num_queued_kernels", num_queued_kernels, Release());
  m.def(
      "synchronize_stream",
      [](StreamId stream) {
        report().host_waits("stream");
        synchronize_stream(stream);
      },
      Release());
  m.def(
      "synchronize_device",
      [] {
        report().host_waits("device");
        synchronize_device();
      },
      Release());
}

void define_memory(py::module_& m) {
  py::class_<MemoryStats>(m, "MemoryStats")
      .def_readonly("allocated", &MemoryStats::allocated)
      .def_readonly("peak_allocated", &MemoryStats::peak_allocated)
      .def_readonly("reserved", &MemoryStats::reserved)
      .def_readonly("peak_reserved", &MemoryStats::peak_reserved);
  m.def("set_capacity", set_capacity, Release());
  m.def("memory_stats", memory_stats, Release());
  m.def("reset_peak_memory", reset_peak_memory, Release());
  m.def("register_host", register_host, Release());
  m.def("unregister_host", unregister_host, Release());
}

void define_timing(py::module_& m) {
  py::class_<Span>(m, "Span")
      .def_readonly("name", &Span::name)
      .def_readonly("engine", &Span::engine, "0: compute, 1: copies to the device, 2: copies to the host.")
      .def_readonly("begin", &Span::begin, "Seconds, of time.monotonic().")
      .def_readonly("end", &Span::end)
      .def_readonly("nbytes", &Span::nbytes, "Of a copy.");
  m.def(
      "begin_timing",
      [](double operations, double memory, double pinned, double pageable, Seconds launch, bool has_values) {
        synchronize_device();
        std::lock_guard lock(device_mutex());
        timing().begin({operations, memory, pinned, pageable, launch}, has_values);
      },
      py::arg("operations"), py::arg("memory"), py::arg("pinned"), py::arg("pageable"), py::arg("launch"),
      py::arg("has_values"), Release());
  m.def(
      "end_timing",
      [] {
        synchronize_device();
        std::lock_guard lock(device_mutex());
        timing().end();
      },
      Release());
  m.def(
      "take_spans",
      [] {
        std::lock_guard lock(device_mutex());
        return timing().take_spans();
      },
      Release(), "What each engine has done, or will, since the last call.");
  m.def(
      "sleep",
      [](Seconds seconds) { enqueue(current_stream(), "sleep", {}, {}, [] {}, {Engine::compute, seconds, 0}); },
      Release());
}

}  // namespace

PYBIND11_MODULE(_simulated_cuda, m) {
  c10::SetAllocator(c10::kCUDA, device_allocator());
  at::setHostAllocator(c10::kCUDA, pinned_allocator());
  m.def("init", [] { at::globalContext().lazyInitDevice(c10::kCUDA); });
  define_streams(m);
  define_memory(m);
  define_timing(m);
  m.def("races", [] { return report().races(); }, Release());
  m.def("counts", [] { return report().counts(); }, Release());
  m.def("clear_report", [] { report().clear(); }, Release());
  m.def("listen", &listen, "Call a function with the reason whenever the host waits; None ends it.");
}

}  // namespace simulated_cuda
