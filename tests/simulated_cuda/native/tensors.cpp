// Operators that make tensors, or look at the same memory in another form: nothing is queued.
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/native/Resize.h>
#include <torch/library.h>

#include <cstring>
#include <utility>

#include "device_memory.hpp"
#include "streams.hpp"

namespace simulated_cuda {

namespace {

const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty_memory_format(c10::IntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                               std::optional<c10::Device>, std::optional<bool>,
                               std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, device_allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, device_allocator(), kKeys, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, c10::IntArrayRef sizes, c10::IntArrayRef strides,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, sizes, strides, offset);
}

at::Tensor view(const at::Tensor& self, c10::IntArrayRef sizes) { return at::native::view(self, sizes); }

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  return at::native::_reshape_alias(self, sizes, strides);
}

// A storage that is too small is replaced by a larger one with the same bytes.
void grow(const at::Storage& storage, size_t nbytes) {
  c10::DataPtr fresh = device_allocator()->allocate(nbytes);
  if (const size_t old_nbytes = storage.nbytes(); old_nbytes > 0) {
    char* const from = static_cast<char*>(storage.mutable_data());
    char* const to = static_cast<char*>(fresh.get());
    enqueue(current_stream(), "aten::resize_", {{from, old_nbytes}}, {{to, old_nbytes}},
            [=] { std::memcpy(kernel_view(to), kernel_view(from), old_nbytes); });
  }
  storage.set_data_ptr_noswap(std::move(fresh));
  storage.set_nbytes(nbytes);
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef sizes, std::optional<c10::MemoryFormat>) {
  const int64_t numel = c10::multiply_integers(sizes);
  const size_t nbytes = static_cast<size_t>((self.storage_offset() + numel) * self.element_size());
  if (nbytes > self.storage().nbytes()) grow(self.storage(), nbytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

at::Tensor& set_storage_part(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef sizes,
                             c10::IntArrayRef strides) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (strides.data()) {
    impl->set_sizes_and_strides(sizes, strides);
  } else {
    impl->set_sizes_contiguous(sizes);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage) {
  const auto numel = static_cast<int64_t>(storage.nbytes() / self.element_size());
  return set_storage_part(self, std::move(storage), 0, {numel}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage_part(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

void record_stream(at::Tensor& self, c10::Stream stream) { record_use(self.storage().mutable_data(), stream.id()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty_memory_format);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("resize_", resize_);
  library.impl("set_.source_Storage_storage_offset", set_storage_part);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("record_stream", record_stream);
}

}  // namespace

}  // namespace simulated_cuda
