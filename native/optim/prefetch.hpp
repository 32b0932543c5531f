// Prefetches into the cache what a pass over memory needs later. In an unnamed namespace: see simd_body.hpp.
#pragma once

#include <cstddef>

namespace lightning_ssd::optim {
namespace {

constexpr size_t kPrefetchNbytes = 4096;  // ahead: the CPU's own prefetchers stop at each page

// Prefetches kNbytes at that distance after `at`. An address past the end of the array does no harm.
template <size_t kNbytes>
[[gnu::always_inline]] inline void prefetch(const void* at) {
  for (size_t line = 0; line < kNbytes; line += 64) {
    __builtin_prefetch(static_cast<const char*>(at) + kPrefetchNbytes + line);
  }
}

}  // namespace
}  // namespace lightning_ssd::optim
