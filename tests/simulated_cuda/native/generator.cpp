#include "generator.hpp"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/GeneratorImpl.h>

#include <array>
#include <cstring>
#include <mutex>

namespace simulated_cuda {

namespace {

constexpr uint64_t kDefaultSeed = 67280421310721;  // torch's
constexpr uint64_t kOffsetStep = 4;

class Generator final : public c10::GeneratorImpl {
 public:
  Generator() : c10::GeneratorImpl(c10::Device(c10::kCUDA, 0), c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}

  static c10::DeviceType device_type() { return c10::kCUDA; }  // asked by `check_generator`

  void set_current_seed(uint64_t seed) override { state_ = {seed, 0}; }
  void set_offset(uint64_t offset) override { state_[1] = offset; }
  uint64_t get_offset() const override { return state_[1]; }
  uint64_t current_seed() const override { return state_[0]; }

  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return current_seed();
  }

  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.numel() == sizeof(state_), "simulated CUDA: the state of a generator has ", sizeof(state_),
                " bytes, this has ", state.numel());
    std::memcpy(state_.data(), state.data(), sizeof(state_));
  }

  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    at::Tensor state = at::empty({sizeof(state_)}, at::TensorOptions().dtype(at::kByte).device(at::kCPU));
    std::memcpy(state.mutable_data_ptr(), state_.data(), sizeof(state_));
    return state.getIntrusivePtr();
  }

  uint64_t draw() {
    state_[1] += kOffsetStep;
    uint64_t mixed = state_[0] * 0x9E3779B97F4A7C15u + state_[1] * 0xBF58476D1CE4E5B9u;
    mixed ^= mixed >> 31;
    mixed *= 0x94D049BB133111EBu;
    return mixed ^ (mixed >> 29);
  }

 private:
  Generator* clone_impl() const override {
    auto* copy = new Generator();
    copy->state_ = state_;
    return copy;
  }

  std::array<uint64_t, 2> state_{kDefaultSeed, 0};  // seed, offset
};

}  // namespace

const at::Generator& default_generator() {
  static const at::Generator instance = at::make_generator<Generator>();
  return instance;
}

at::Generator new_generator() { return at::make_generator<Generator>(); }

uint64_t draw_seed(const std::optional<at::Generator>& generator) {
  at::Generator chosen = generator && generator->defined() ? *generator : default_generator();
  std::lock_guard lock(chosen.mutex());
  return chosen.get<Generator>()->draw();
}

}  // namespace simulated_cuda
