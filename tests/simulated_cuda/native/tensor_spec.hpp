// A device tensor as a kernel sees it: an address and a form. It holds no reference, so memory that is freed before the
// kernel runs is used again, as on a real device.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "streams.hpp"

namespace simulated_cuda {

struct TensorSpec {
  explicit TensorSpec(const at::Tensor& tensor);

  at::Tensor on_host() const;  // a CPU tensor on the kernels' view of the same memory
  bool is_empty() const { return nbytes == 0; }

  char* begin;
  size_t nbytes;  // from the first element to the last
  std::vector<int64_t> sizes, strides;
  c10::ScalarType dtype;
  bool is_wrapped_number;
};

Ranges ranges_of(const std::vector<TensorSpec>& specs);
bool is_on_device(const at::Tensor& tensor);
// Keeps that `like` is a Python number, which takes part in no type promotion.
at::Tensor& mark_as_number(at::Tensor& tensor, const at::Tensor& like);

}  // namespace simulated_cuda
