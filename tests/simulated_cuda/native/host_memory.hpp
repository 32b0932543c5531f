// Host memory that the device copies from and to while the host goes on: registered, or allocated as pinned.
#pragma once

#include <ATen/core/CachingHostAllocator.h>

#include <cstddef>
#include <cstdint>

namespace simulated_cuda {

// cudaHostRegister and cudaHostUnregister; return 0, or CUDA's error number.
int register_host(uintptr_t address, size_t nbytes);
int unregister_host(uintptr_t address);
bool is_registered(const void* address, size_t nbytes);

at::HostAllocator* pinned_allocator();

// Around a copy that was queued: memory of `pinned_allocator` that is freed meanwhile stays until the copy is over, as
// torch's does. Of registered memory only its owner can know.
void begin_host_copy(const void* address);
void end_host_copy(const void* address);

}  // namespace simulated_cuda
