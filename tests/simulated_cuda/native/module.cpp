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
  bool is_done() const { return !point_ || point_->is_done; }
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

}  // namespace

PYBIND11_MODULE(_simulated_cuda, m) {
  c10::SetAllocator(c10::kCUDA, device_allocator());
  at::setHostAllocator(c10::kCUDA, pinned_allocator());
  m.def("init", [] { at::globalContext().lazyInitDevice(c10::kCUDA); });
  define_streams(m);
  define_memory(m);
  m.def("races", [] { return report().races(); }, Release());
  m.def("counts", [] { return report().counts(); }, Release());
  m.def("clear_report", [] { report().clear(); }, Release());
  m.def("listen", &listen, "Call a function with the reason whenever the host waits; None ends it.");
}

}  // namespace simulated_cuda
