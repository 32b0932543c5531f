// What torch asks a CUDA device: device guard, streams and events of autograd, allocators, generators.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "device_memory.hpp"
#include "generator.hpp"
#include "host_memory.hpp"
#include "report.hpp"
#include "streams.hpp"

namespace simulated_cuda {

namespace {

const c10::Device kDevice(c10::kCUDA, 0);

c10::Stream as_stream(StreamId id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return as_stream(current_stream()); }
  c10::Stream getDefaultStream(c10::Device) const override { return as_stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return as_stream(next_stream()); }
  c10::Stream getNewStream(c10::Device, int) const override { return as_stream(next_stream()); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return as_stream(exchange_current_stream(stream.id()));
  }
  bool queryStream(const c10::Stream& stream) const override { return is_idle(stream.id()); }
  void synchronizeStream(const c10::Stream& stream) const override {
    report().host_waits("stream");
    synchronize_stream(stream.id());
  }

  // An event of torch's is a pointer to the point that it was last recorded at.
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new PointPtr();
    *as_point(*event) = simulated_cuda::record(stream.id());
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) wait_on(stream.id(), *as_point(event));
  }
  bool queryEvent(void* event) const override { return !event || query(*as_point(event)); }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete as_point(event); }
  void synchronizeEvent(void* event) const override {
    if (!event) return;
    report().host_waits("event");
    synchronize(*as_point(event));
  }

  void synchronizeDevice(c10::DeviceIndex) const override {
    report().host_waits("device");
    synchronize_device();
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    record_use(data.get(), stream.id());
  }

 private:
  static PointPtr* as_point(void* event) { return static_cast<PointPtr*>(event); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

// Looked up by its unqualified name.
class CUDAHooks final : public at::CUDAHooksInterface {
 public:
  explicit CUDAHooks(at::CUDAHooksArgs) {}

  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }

  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }

  bool isPinnedPtr(const void* data) const override { return is_registered(data, 1); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return device_allocator(); }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  // The first one that Python asks for is the default one, which torch.cuda.default_generators shows.
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    static bool is_first = true;
    return std::exchange(is_first, false) ? default_generator() : new_generator();
  }

  void deviceSynchronize(c10::DeviceIndex) const override {
    report().host_waits("device");
    synchronize_device();
  }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace simulated_cuda
