// Device memory: one block of host memory mapped twice. Tensors point into a mapping that may not be touched, so that a
// host access faults as on a real device; kernels work through the other. A caching allocator hands it out by stream.
#pragma once

#include <c10/core/Allocator.h>

#include "streams.hpp"

namespace simulated_cuda {

struct MemoryStats {  // bytes
  size_t allocated, peak_allocated, reserved, peak_reserved;
};

void set_capacity(size_t nbytes);  // before anything is allocated
char* kernel_view(const void* address);

// As torch's: memory that is freed belongs to the stream that was current when it was allocated, and is used again
// there at once, after what other streams had queued when `record_use` had named them.
c10::Allocator* device_allocator();
void record_use(void* address, StreamId stream);

MemoryStats memory_stats();
void reset_peak_memory();

}  // namespace simulated_cuda
