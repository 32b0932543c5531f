// The tensors inside an operator's arguments and results.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>

#include <optional>
#include <vector>

namespace simulated_cuda {

inline bool is_list_of_optional_tensors(const c10::IValue& value) {
  if (!value.isList()) return false;
  const auto* element = value.toList().elementType()->castRaw<c10::OptionalType>();
  return element && element->getElementType()->kind() == c10::TypeKind::TensorType;
}

// `value` with each defined tensor in it replaced by what `change` returns for it, in order.
template <class Change>
c10::IValue map_tensors(const c10::IValue& value, Change change) {
  if (value.isTensor()) return value.toTensor().defined() ? c10::IValue(change(value.toTensor())) : value;
  if (value.isTensorList()) {
    std::vector<at::Tensor> found;
    for (const at::Tensor& tensor : value.toTensorList()) found.push_back(tensor.defined() ? change(tensor) : tensor);
    return c10::IValue(found);
  }
  if (is_list_of_optional_tensors(value)) {
    c10::List<std::optional<at::Tensor>> found;
    for (const auto& item : value.toList()) {
      const c10::IValue element(item);
      const bool is_tensor = element.isTensor() && element.toTensor().defined();
      found.push_back(is_tensor ? std::optional<at::Tensor>(change(element.toTensor())) : std::nullopt);
    }
    return c10::IValue(found);
  }
  return value;
}

template <class Visit>
void each_tensor(const c10::IValue& value, Visit visit) {
  map_tensors(value, [&](const at::Tensor& tensor) {
    visit(tensor);
    return tensor;
  });
}

}  // namespace simulated_cuda
