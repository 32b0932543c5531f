// Copies between host and device, and values that the host asks for.
#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <map>
#include <memory>
#include <string_view>

#include "device_memory.hpp"
#include "dispatch.hpp"
#include "host_memory.hpp"
#include "report.hpp"
#include "streams.hpp"
#include "tensor_spec.hpp"

namespace simulated_cuda {

namespace {

constexpr unsigned char kUnwritten = 0xFF;

size_t checksum(const char* begin, size_t nbytes) { return std::hash<std::string_view>()({begin, nbytes}); }

// Host memory that copies of the device will write to. The mutex of the device guards it.
std::multimap<const char*, size_t> arriving;

bool is_arriving(const char* begin, size_t nbytes) {
  std::lock_guard lock(device_mutex());
  for (const auto& [other, size] : arriving) {
    if (other < begin + nbytes && begin < other + size) return true;
  }
  return false;
}

// The copy reads host memory when it runs; that nobody has changed it by then is checked. A copy that was queued before
// may do so: if it comes too late, this one brings NaN.
void to_device_later(const TensorSpec& to, const at::Tensor& source) {
  const char* from = static_cast<const char*>(source.const_data_ptr());
  const size_t nbytes = source.nbytes();
  const Cost cost = timing().copy(Engine::to_device, nbytes, true);
  report().count("copy to the device, asynchronous");
  if (!timing().has_values()) return enqueue(current_stream(), "copy to the device", {}, {}, {}, cost);
  const size_t sum = checksum(from, nbytes);
  const bool may_change = is_arriving(from, nbytes);
  begin_host_copy(from);
  const auto run = [=] {
    const bool is_same = may_change || checksum(from, nbytes) == sum;
    if (!is_same) report().race("host memory changed while it was on its way to the device");
    std::memcpy(kernel_view(to.begin), from, nbytes);
    end_host_copy(from);
  };
  enqueue(current_stream(), "copy to the device", {}, ranges_of({to}), run, cost);
}

// From pageable memory: the driver has taken the bytes when the call returns.
void to_device(const TensorSpec& to, const at::Tensor& source, bool non_blocking) {
  report().count("copy to the device, of pageable memory");
  const auto run = [to, value = source.clone()] { to.on_host().copy_(value); };
  const Cost cost = timing().copy(Engine::to_device, source.nbytes(), false);
  enqueue(current_stream(), "copy to the device", {}, ranges_of({to}), run, cost);
  if (non_blocking && !timing().is_on()) return;  // else the host copies, which takes as long
  report().host_waits("copy to the device");
  synchronize_stream(current_stream());
}

// The copy writes host memory when it runs. Until then it is NaN, and that nobody has changed it is checked.
void to_host_later(const at::Tensor& self, const TensorSpec& from) {
  char* to = static_cast<char*>(self.mutable_data_ptr());
  const size_t nbytes = self.nbytes();
  report().count("copy to the host, asynchronous");
  const Cost cost = timing().copy(Engine::to_host, nbytes, true);
  if (!timing().has_values()) return enqueue(current_stream(), "copy to the host", {}, {}, {}, cost);
  std::memset(to, kUnwritten, nbytes);
  begin_host_copy(to);
  {
    std::lock_guard lock(device_mutex());
    arriving.emplace(to, nbytes);
  }
  const auto run = [=] {
    for (size_t i = 0; i < nbytes; ++i) {
      if (static_cast<unsigned char>(to[i]) == kUnwritten) continue;
      report().race("host memory was written to while a copy from the device was on its way there");
      break;
    }
    std::memcpy(to, kernel_view(from.begin), nbytes);
    arriving.erase(arriving.find(to));  // any of the same place
    end_host_copy(to);
  };
  enqueue(current_stream(), "copy to the host", ranges_of({from}), {}, run, cost);
}

// The values of a device tensor, for which the host waits.
at::Tensor fetch(const at::Tensor& tensor, const char* why) {
  report().host_waits(why);
  auto found = std::make_shared<at::Tensor>();
  const TensorSpec from(tensor);
  const auto run = [=] { *found = from.on_host().clone(); };
  const Cost cost = timing().copy(Engine::to_host, from.nbytes, false);
  enqueue(current_stream(), "copy to the host", ranges_of({from}), {}, run, cost);
  synchronize_stream(current_stream());
  return timing().has_values() ? *found : at::zeros(tensor.sizes(), tensor.options().device(at::kCPU));
}

bool has_same_bytes(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.is_contiguous() && b.is_contiguous() &&
         a.is_conj() == b.is_conj() && a.is_neg() == b.is_neg();
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.is_same(source) || self.numel() == 0) return self;
  if (is_on_device(self) && is_on_device(source)) {
    const TensorSpec to(self), from(source);
    const auto run = [=] { to.on_host().copy_(from.on_host()); };
    const Cost cost = timing().kernel(0, to.nbytes + from.nbytes);
    enqueue(current_stream(), "aten::copy_", ranges_of({from}), ranges_of({to}), run, cost);
    wait_for_room(current_stream());
    return self;
  }
  const at::Tensor& host = is_on_device(self) ? source : self;
  const bool is_async =
      non_blocking && has_same_bytes(self, source) && is_registered(host.const_data_ptr(), host.nbytes());
  if (is_on_device(self)) {
    const TensorSpec to(self);
    is_async ? to_device_later(to, source) : to_device(to, source, non_blocking);
  } else if (is_async) {
    to_host_later(self, TensorSpec(source));
  } else {
    const at::Tensor value = fetch(source, non_blocking ? "copy to pageable host memory" : "copy to the host");
    const BelowAutograd guard;
    self.copy_(value);
  }
  return self;
}

at::Scalar local_scalar_dense(const at::Tensor& self) { return fetch(self, "item").item(); }

bool equal(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(is_on_device(a) && is_on_device(b),
              "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!");
  return a.sizes() == b.sizes() && at::equal(fetch(a, "equal"), fetch(b, "equal"));
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("copy_", copy_);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("equal", equal);
}

}  // namespace

}  // namespace simulated_cuda
