// Kernels of all operators, by one boxed fallback: the form of the result is known from what is written to or from the
// operator's meta kernel; its CPU kernel does the work, later, on the kernels' view of device memory.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <memory>
#include <set>
#include <string>
#include <utility>

#include "dispatch.hpp"
#include "forms.hpp"
#include "generator.hpp"
#include "operations.hpp"
#include "report.hpp"
#include "streams.hpp"
#include "tensor_spec.hpp"
#include "values.hpp"

namespace simulated_cuda {

namespace {

using c10::IValue;
using torch::jit::Stack;

// Operators whose result has a form that depends on values, or is no tensor, though their schema does not tell; and one
// of which the CPU's kernel, which does the work, makes statistics of another form than CUDA's.
const std::set<std::string> kFormDependsOnValues{
    "aten::nonzero",    "aten::masked_select", "aten::_unique2", "aten::unique_dim",        "aten::bincount",
    "aten::is_nonzero", "aten::item",          "aten::equal",    "aten::repeat_interleave", "aten::native_batch_norm",
};
// Operators that draw random numbers, though they take no generator.
const std::set<std::string> kDraws{"aten::native_dropout", "aten::rrelu_with_noise"};

bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

// What a kernel is launched with: device tensors by address, host tensors by value.
class LaunchArguments {
 public:
  explicit LaunchArguments(const std::vector<IValue>& values) {
    for (const IValue& value : values) {
      auto& specs = specs_.emplace_back();
      IValue held = map_tensors(value, [&](const at::Tensor& tensor) {
        if (is_on_device(tensor)) {
          specs.emplace_back(TensorSpec(tensor));
          // A reference would keep its memory: an empty tensor has its place.
          return at::empty({0}, at::TensorOptions().dtype(tensor.scalar_type()));
        }
        specs.emplace_back(std::nullopt);
        at::Tensor copy = tensor.clone();
        return mark_as_number(copy, tensor);
      });
      values_.push_back(held.isDevice() ? IValue(c10::Device(c10::kCPU)) : held);
    }
  }

  std::vector<IValue> on_host() const {
    std::vector<IValue> found;
    for (size_t i = 0; i < values_.size(); ++i) {
      size_t at = 0;
      found.push_back(map_tensors(values_[i], [&](const at::Tensor& tensor) {
        const auto& spec = specs_[i][at++];
        return spec ? spec->on_host() : tensor;
      }));
    }
    return found;
  }

 private:
  std::vector<IValue> values_;
  std::vector<std::vector<std::optional<TensorSpec>>> specs_;
};

// One call of an operator.
class Call {
 public:
  Call(const c10::OperatorHandle& op, std::vector<IValue> values)
      : op_(op), schema_(op.schema()), values_(std::move(values)) {
    for (size_t i = 0; i < values_.size(); ++i) {
      each_tensor(values_[i], [&](const at::Tensor& tensor) {
        if (is_on_device(tensor)) (is_written(i) ? writes_ : reads_).emplace_back(tensor);
      });
    }
    require_one_device();
    find_seed();
  }

  std::vector<IValue> run() {
    const std::vector<int> sources = written_arguments();
    Stack forms;
    return find_forms(forms) ? launch(sources, forms) : run_now(sources);
  }

 private:
  const std::string& name() const { return schema_.name(); }

  bool is_written(size_t i) const {
    const auto* alias = schema_.arguments()[i].alias_info();
    return alias && alias->isWrite();
  }

  void require_one_device() const {
    if (reads_.empty() && writes_.empty()) return;
    if (starts_with(name(), "aten::index") || starts_with(name(), "aten::_index")) return;  // indices may be anywhere
    for (const IValue& value : values_) {
      each_tensor(value, [&](const at::Tensor& tensor) {
        TORCH_CHECK(is_on_device(tensor) || tensor.dim() == 0,
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
                    name(), ")");
      });
    }
  }

  void find_seed() {
    std::optional<at::Generator> given;
    bool draws = kDraws.count(name()) > 0;
    for (size_t i = 0; i < values_.size(); ++i) {
      if (schema_.arguments()[i].name() != "generator") continue;
      draws = true;
      if (values_[i].isGenerator()) given = values_[i].toGenerator();
    }
    if (draws) seed_ = draw_seed(given);
  }

  // For each result, the argument that it is; -1 for a new tensor.
  std::vector<int> written_arguments() const {
    std::vector<int> found;
    for (const auto& result : schema_.returns()) {
      int source = -1;
      for (size_t i = 0; i < values_.size() && result.alias_info(); ++i) {
        const auto* alias = schema_.arguments()[i].alias_info();
        if (alias && *alias == *result.alias_info() && alias->isWrite()) source = static_cast<int>(i);
      }
      TORCH_CHECK(source >= 0 || !result.alias_info(), "simulated CUDA: ", name(), ".", schema_.overload_name(),
                  " returns a view, which needs a kernel of its own");
      found.push_back(source);
    }
    return found;
  }

  // Whether the forms of the results are known before the work is done; if so, `forms` has them, on the meta device.
  bool find_forms(Stack& forms) {
    if (kFormDependsOnValues.count(name()) > 0) return false;
    bool is_known = true;
    for (const auto& result : schema_.returns()) {
      const auto& type = result.type();
      if (type->kind() != c10::TypeKind::TensorType && !type->isSubtypeOf(*c10::ListType::ofTensors())) return false;
      is_known = is_known && result.alias_info();
    }
    for (const TensorSpec& spec : writes_) is_known = is_known && !spec.is_empty();  // an empty one may grow
    if (is_known) return true;
    const auto key = writes_.empty() ? FormCache::key_of(&schema_, values_) : std::nullopt;
    if (key && recall(*key, forms)) return true;
    const std::vector<IValue> inputs = on_meta();
    forms = inputs;
    try {
      const BelowAutograd guard;
      op_.callBoxed(&forms);
    } catch (const std::exception&) {
      return false;  // it has no meta kernel, or the call is wrong: then the CPU's kernel says so
    }
    for (size_t i = 0; i < values_.size(); ++i) grow_output(i, inputs[i]);
    if (key) {
      std::lock_guard lock(device_mutex());
      FormCache::instance().add(*key, forms);
    }
    return true;
  }

  static bool recall(const std::string& key, Stack& forms) {
    std::lock_guard lock(device_mutex());
    const Forms* known = FormCache::instance().find(key);
    if (known) forms = *known;
    return known != nullptr;
  }

  std::vector<IValue> on_meta() const {
    std::vector<IValue> found;
    for (const IValue& value : values_) {
      IValue meta = map_tensors(value, [](const at::Tensor& tensor) {
        if (!is_on_device(tensor)) return tensor;
        at::Tensor made = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
        return mark_as_number(made, tensor);
      });
      found.push_back(meta.isDevice() ? IValue(c10::Device(c10::kMeta)) : meta);
    }
    return found;
  }

  void grow_output(size_t i, const IValue& meta) {
    if (!is_written(i) || !values_[i].isTensor() || !meta.isTensor()) return;
    at::Tensor tensor = values_[i].toTensor();
    if (!is_on_device(tensor) || meta.toTensor().sizes() == tensor.sizes()) return;
    tensor.resize_(meta.toTensor().sizes());
    writes_.emplace_back(tensor);
  }

  std::vector<IValue> launch(const std::vector<int>& sources, const Stack& forms) {
    std::vector<IValue> results;
    std::vector<std::pair<size_t, std::vector<TensorSpec>>> made;  // by number of the result
    for (size_t i = 0; i < sources.size(); ++i) {
      if (sources[i] >= 0) {
        results.push_back(values_[static_cast<size_t>(sources[i])]);
        continue;
      }
      auto& specs = made.emplace_back(i, std::vector<TensorSpec>()).second;
      results.push_back(map_tensors(forms.at(i), [&](const at::Tensor& form) {
        at::Tensor tensor = at::empty_strided(form.sizes(), form.strides(), on_device(form, i));
        writes_.push_back(specs.emplace_back(tensor));
        return tensor;
      }));
    }
    const StreamId stream = current_stream();
    const Cost cost = timing().kernel(num_operations(name(), values_), num_bytes());
    if (timing().has_values()) {
      enqueue(stream, name(), ranges_of(reads_), ranges_of(writes_), work_into(std::move(made)), cost);
    } else {
      enqueue(stream, name(), {}, {}, {}, cost);
    }
    wait_for_room(stream);
    return results;
  }

  // What a kernel does later: the results with these numbers go to where they are wanted.
  std::function<void()> work_into(std::vector<std::pair<size_t, std::vector<TensorSpec>>> made) const {
    const auto arguments = std::make_shared<LaunchArguments>(values_);
    return [op = op_, arguments, seed = seed_, made = std::move(made)] {
      Stack found = call_on_host(op, arguments->on_host(), seed);
      for (const auto& [i, specs] : made) {
        size_t at = 0;
        each_tensor(found.at(i), [&](const at::Tensor& tensor) {
          if (at < specs.size()) specs[at].on_host().copy_(tensor);
          ++at;
        });
      }
    };
  }

  size_t num_bytes() const {
    size_t found = 0;
    for (const TensorSpec& spec : reads_) found += spec.nbytes;
    for (const TensorSpec& spec : writes_) found += spec.nbytes;
    return found;
  }

  at::TensorOptions on_device(const at::Tensor& form, size_t result) const {
    const auto options = form.options().device(c10::Device(c10::kCUDA, 0)).pinned_memory(false);
    // The CPU's kernel, which does the work, keeps statistics in the dtype of its input; CUDA's in float32.
    const bool are_statistics = result > 0 && name() == "aten::native_layer_norm";
    return are_statistics ? options.dtype(values_[0].toTensor().scalar_type()) : options;
  }

  // The host waits for what is queued and does the work itself.
  std::vector<IValue> run_now(const std::vector<int>& sources) {
    report().host_waits("operator " + name());
    const Cost cost = timing().kernel(0, num_bytes());
    enqueue(current_stream(), name(), ranges_of(reads_), ranges_of(writes_), [] {}, cost);
    synchronize_stream(current_stream());
    Stack found;
    {
      const BelowAutograd guard;
      found = call_on_host(op_, LaunchArguments(values_).on_host(), seed_);
    }
    std::vector<IValue> results;
    for (size_t i = 0; i < sources.size(); ++i) {
      if (sources[i] >= 0) {
        results.push_back(values_[static_cast<size_t>(sources[i])]);
      } else {
        results.push_back(map_tensors(found.at(i), [&](const at::Tensor& tensor) { return sent(tensor); }));
      }
    }
    return results;
  }

  at::Tensor sent(const at::Tensor& value) const {
    const auto options = value.options().device(c10::Device(c10::kCUDA, 0)).pinned_memory(false);
    at::Tensor tensor = at::empty_strided(value.sizes(), value.strides(), options);
    const TensorSpec spec(tensor);
    enqueue(current_stream(), name(), {}, ranges_of({spec}),
            [spec, copy = value.clone()] { spec.on_host().copy_(copy); });
    return tensor;
  }

  static Stack call_on_host(const c10::OperatorHandle& op, std::vector<IValue> values,
                            const std::optional<uint64_t>& seed) {
    bool is_given = false;
    for (size_t i = 0; i < values.size() && seed; ++i) {
      if (op.schema().arguments()[i].name() != "generator") continue;
      values[i] = at::detail::createCPUGenerator(*seed);
      is_given = true;
    }
    Stack stack = std::move(values);
    if (!seed || is_given) {
      op.callBoxed(&stack);
      return stack;
    }
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    const at::Tensor before = generator.get_state();
    generator.set_current_seed(*seed);
    op.callBoxed(&stack);
    generator.set_state(before);
    return stack;
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  const std::vector<IValue> values_;
  std::vector<TensorSpec> reads_, writes_;
  std::optional<uint64_t> seed_;  // of an operator that draws random numbers
};

void run_operator(const c10::OperatorHandle& op, Stack* stack) {
  report().count("kernel");
  const size_t num_arguments = op.schema().arguments().size();
  std::vector<IValue> values(stack->end() - static_cast<std::ptrdiff_t>(num_arguments), stack->end());
  torch::jit::drop(*stack, num_arguments);
  for (IValue& result : Call(op, std::move(values)).run()) stack->push_back(std::move(result));
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_operator>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  // Else torch takes its own composite, whose statistics the CPU's backward would refuse.
  library.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&run_operator>());
}

}  // namespace

}  // namespace simulated_cuda
