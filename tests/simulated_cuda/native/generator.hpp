// Random numbers of the device: a seed and an offset, as CUDA's. Each kernel that draws takes the next offset when it
// is launched, so what it draws does not depend on when it runs.
#pragma once

#include <ATen/core/Generator.h>

#include <optional>

namespace simulated_cuda {

const at::Generator& default_generator();
at::Generator new_generator();

// A seed for one kernel, from `generator` or the default one.
uint64_t draw_seed(const std::optional<at::Generator>& generator);

}  // namespace simulated_cuda
