// How much arithmetic an operator does.
#pragma once

#include <ATen/core/ivalue.h>

#include <map>
#include <string>
#include <vector>

namespace simulated_cuda {

// Of a matrix product, two for each product of two numbers; 0 for all others, which move bytes.
inline double num_operations(const std::string& name, const std::vector<c10::IValue>& arguments) {
  static const std::map<std::string, size_t> first_factor{
      {"aten::mm", 0}, {"aten::bmm", 0}, {"aten::addmm", 1}, {"aten::baddbmm", 1}, {"aten::_addmm_activation", 1}};
  const auto found = first_factor.find(name);
  if (found == first_factor.end()) return 0;
  const at::Tensor a = arguments[found->second].toTensor(), b = arguments[found->second + 1].toTensor();
  return 2.0 * static_cast<double>(a.numel()) * static_cast<double>(b.size(-1));
}

}  // namespace simulated_cuda
