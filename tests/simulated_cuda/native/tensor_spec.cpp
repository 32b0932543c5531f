#include "tensor_spec.hpp"

#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>

#include "device_memory.hpp"

namespace simulated_cuda {

TensorSpec::TensorSpec(const at::Tensor& tensor)
    : begin(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
      nbytes(0),
      sizes(tensor.sizes().vec()),
      strides(tensor.strides().vec()),
      dtype(tensor.scalar_type()),
      is_wrapped_number(tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
  if (tensor.numel() == 0) return;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  nbytes = static_cast<size_t>((last + 1) * tensor.element_size());
}

at::Tensor TensorSpec::on_host() const {
  const auto options = at::TensorOptions().dtype(dtype).device(at::kCPU);
  at::Tensor tensor = is_empty() ? at::empty_strided(sizes, strides, options)
                                 : at::from_blob(kernel_view(begin), sizes, strides, options);
  if (is_wrapped_number) tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
  return tensor;
}

Ranges ranges_of(const std::vector<TensorSpec>& specs) {
  Ranges found;
  for (const TensorSpec& spec : specs) {
    if (!spec.is_empty()) found.push_back({spec.begin, spec.nbytes});
  }
  return found;
}

bool is_on_device(const at::Tensor& tensor) { return tensor.defined() && tensor.device().is_cuda(); }

at::Tensor& mark_as_number(at::Tensor& tensor, const at::Tensor& like) {
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
  return tensor;
}

}  // namespace simulated_cuda
