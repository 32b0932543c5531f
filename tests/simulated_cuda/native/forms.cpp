#include "forms.hpp"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

namespace simulated_cuda {

namespace {

constexpr size_t kMaxKnown = 20000;

class Key {
 public:
  template <class Value>
  void add(const Value& value) {
    text_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }

  // Whether `value` is of a kind that is compared.
  bool add_value(const c10::IValue& value) {
    add(static_cast<uint32_t>(tag_of(value)));
    if (value.isTensor()) {
      add_tensor(value.toTensor());
    } else if (value.isInt()) {
      add(value.toInt());
    } else if (value.isDouble()) {
      add(value.toDouble());
    } else if (value.isBool()) {
      add(value.toBool());
    } else if (value.isList()) {
      return add_list(value);
    } else {
      return value.isNone() || value.isDevice() || value.isGenerator();
    }
    return true;
  }

  std::string text() && { return std::move(text_); }

 private:
  enum class Tag : uint32_t { tensor, integer, real, boolean, list, other };

  static Tag tag_of(const c10::IValue& value) {
    if (value.isTensor()) return Tag::tensor;
    if (value.isInt()) return Tag::integer;
    if (value.isDouble()) return Tag::real;
    if (value.isBool()) return Tag::boolean;
    return value.isList() ? Tag::list : Tag::other;
  }

  void add_tensor(const at::Tensor& tensor) {
    add(tensor.defined());
    if (!tensor.defined()) return;
    add(tensor.scalar_type());
    add(tensor.device().type());
    add(tensor.unsafeGetTensorImpl()->is_wrapped_number());
    add(tensor.dim());
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      add(tensor.size(i));
      add(tensor.stride(i));
    }
  }

  bool add_list(const c10::IValue& value) {
    const auto items = value.toListRef();
    add(items.size());
    for (const c10::IValue& item : items) {
      if (!add_value(item)) return false;
    }
    return true;
  }

  std::string text_;
};

}  // namespace

std::optional<std::string> FormCache::key_of(const void* op, const std::vector<c10::IValue>& arguments) {
  Key key;
  key.add(op);
  for (const c10::IValue& argument : arguments) {
    if (!key.add_value(argument)) return std::nullopt;
  }
  return std::move(key).text();
}

const Forms* FormCache::find(const std::string& key) const {
  const auto found = known_.find(key);
  return found == known_.end() ? nullptr : &found->second;
}

void FormCache::add(const std::string& key, const Forms& forms) {
  if (known_.size() >= kMaxKnown) known_.clear();
  known_[key] = forms;
}

FormCache& FormCache::instance() {
  static FormCache instance;
  return instance;
}

}  // namespace simulated_cuda
