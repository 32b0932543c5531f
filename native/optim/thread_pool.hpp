// The kernels' own worker threads, started when first needed and never ended; none runs between calls.
#pragma once

#include <cstddef>
#include <functional>

namespace lightning_ssd::optim {

size_t num_threads();
void set_num_threads(size_t num);  // at least 1; waits for a call in progress

// Runs body(begin, end) over [0, num_blocks), cut into ranges that the threads, the caller among them, take one after
// the other. The caller runs all if another thread uses the workers, or after a fork. The body must not throw.
void parallel_for(size_t num_blocks, const std::function<void(size_t begin, size_t end)>& body);

}  // namespace lightning_ssd::optim
