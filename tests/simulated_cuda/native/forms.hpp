// What form the results of an operator had before: many meta kernels are Python, and take longer than the work.
#pragma once

#include <ATen/core/ivalue.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace simulated_cuda {

using Forms = std::vector<c10::IValue>;  // tensors on the meta device

class FormCache {
 public:
  // What the call is told by: the operator, the forms of its tensors and its other arguments. None if one of these is
  // of a kind that is not compared.
  static std::optional<std::string> key_of(const void* op, const std::vector<c10::IValue>& arguments);

  const Forms* find(const std::string& key) const;
  void add(const std::string& key, const Forms& forms);

  // Guarded by the device's mutex.
  static FormCache& instance();

 private:
  std::unordered_map<std::string, Forms> known_;
};

}  // namespace simulated_cuda
