// Each level of kernels against the scalar one, bit for bit; checksums against the table; the worker threads.
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "optim/crc32c.hpp"
#include "optim/optim.hpp"
#include "optim/thread_pool.hpp"

using namespace lightning_ssd::optim;

namespace {

struct Random {  // xorshift
  uint64_t state = 88172645463325252ull;
  uint32_t bits() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
  }
  float number() { return (static_cast<float>(bits()) - 2147483648.0f) * 0x1p-31f; }
};

struct State {
  std::vector<float> param, exp_avg, exp_avg_sq;
  std::vector<uint16_t> out;
  bool operator==(const State&) const = default;  // no NaNs in here
};

State random_state(size_t numel) {
  Random random;
  State state;
  for (size_t i = 0; i < numel; ++i) {
    state.param.push_back(random.number());
    state.exp_avg.push_back(random.number());
    const float square = random.number() * random.number();
    const float any = std::bit_cast<float>(random.bits() % 0x7f000000);  // of any exponent, denormals among them
    state.exp_avg_sq.push_back(i % 11 == 0 ? 0.0f : i % 3 == 0 ? any : square * square);
  }
  state.out.resize(numel);
  return state;
}

thread_local int num_external_threads = 7;
int set_threads(int num) { return std::exchange(num_external_threads, num); }

std::atomic<int> plain_sqrt_calls = 0;
void plain_sqrt(int64_t num, const float* in, float* out, int64_t mode) {
  CHECK(mode == kExternalSqrtMode);
  plain_sqrt_calls += 1;
  for (int64_t i = 0; i < num; ++i) {
    out[i] = std::sqrt(in[i]);
  }
}

void sqrt_on_one_thread(int64_t num, const float* in, float* out, int64_t mode) {
  CHECK(num == 1 || num_external_threads == 1);  // the scalar kernels ask for one root at a time
  plain_sqrt(num, in, out, mode);
}

AdamUpdate adam_update(State& state, const std::vector<uint16_t>& grad, SqrtForm form) {
  return {
      .param = state.param.data(),
      .grad = grad.data(),
      .grad_dtype = Dtype::bfloat16,
      .exp_avg = state.exp_avg.data(),
      .exp_avg_sq = state.exp_avg_sq.data(),
      .out = state.out.data(),
      .out_dtype = Dtype::float16,
      .numel = grad.size(),
      .grad_scale = 0.37f,
      .maximize = false,
      .decay = 0.999f,
      .has_penalty = false,
      .penalty = 0,
      .weight1 = 0.1f,
      .beta2 = 0.999f,
      .weight2 = 0.001f,
      .step_size_negative = -0.01f,
      .bias2_sqrt = 0.3f,
      .eps = 1e-8f,
      .sqrt_form = form,
      .external_sqrt = sqrt_on_one_thread,
      .set_external_threads = set_threads,
  };
}

void test_levels_agree() {
  for (const size_t numel : {0, 1, 15, 17, 4095, 4097, 50'001}) {
    Random random;
    std::vector<uint16_t> grad(numel);
    for (uint16_t& bits : grad) {
      bits = static_cast<uint16_t>(0x3c00 | (random.bits() & 0x83ff));
    }
    for (const SqrtForm form :
         {SqrtForm::ieee, SqrtForm::mkl_sse, SqrtForm::mkl_avx2, SqrtForm::mkl_avx512, SqrtForm::external}) {
      CHECK(set_level("scalar"));
      State expected = random_state(numel);
      adam(adam_update(expected, grad, form));
      const double expected_sum = sum_of_squares(expected.param.data(), Dtype::float32, numel);
      for (const std::string& name : levels()) {
        CHECK(set_level(name));
        State state = random_state(numel);
        adam(adam_update(state, grad, form));
        CHECK(state == expected);
        CHECK(sum_of_squares(state.param.data(), Dtype::float32, numel) == expected_sum);
      }
    }
  }
  CHECK(plain_sqrt_calls > 0);
  CHECK(num_external_threads == 7);
  CHECK(!set_level("no such level"));
}

void test_all_halves_survive_a_round_trip() {
  std::vector<uint16_t> halves(65536), back(65536);
  std::vector<float> wide(65536);
  for (size_t i = 0; i < halves.size(); ++i) {
    halves[i] = static_cast<uint16_t>(i);
  }
  for (const std::string& name : levels()) {
    CHECK(set_level(name));
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
      convert(wide.data(), Dtype::float32, halves.data(), dtype, halves.size());
      convert(back.data(), dtype, wide.data(), Dtype::float32, halves.size());
      for (size_t i = 0; i < halves.size(); ++i) {
        CHECK(std::isnan(wide[i]) || back[i] == halves[i]);
      }
    }
  }
}

void test_matching_sqrt() {
  CHECK(matching_sqrt(nullptr) == SqrtForm::ieee);
  CHECK(matching_sqrt(plain_sqrt) == SqrtForm::ieee);
  CHECK(matching_sqrt([](int64_t num, const float* in, float* out, int64_t) {
          std::memcpy(out, in, static_cast<size_t>(num) * sizeof(float));
        }) == SqrtForm::external);
}

void test_crc32c() {
  CHECK(crc32c("123456789", 9) == 0xe3069283);
  Random random;
  std::vector<unsigned char> data(100'000);
  for (unsigned char& byte : data) {
    byte = static_cast<unsigned char>(random.bits());
  }
  for (const Crc32cVariant& variant : crc32c_variants()) {
    const auto same = [&](size_t start, size_t nbytes) {
      const uint32_t state = random.bits();
      return variant.crc(state, data.data() + start, nbytes) == crc32c_software(state, data.data() + start, nbytes);
    };
    for (const size_t nbytes : {0, 1, 7, 8, 511, 512, 575, 576, 767, 768, 24'575, 24'576, 99'900}) {
      for (const size_t start : {0, 1, 5, 64}) {
        CHECK(same(start, nbytes));
      }
    }
    for (int i = 0; i < 500; ++i) {
      CHECK(same(random.bits() % 99, random.bits() % 3000));
    }
  }
  CHECK(crc32c(data.data() + 777, 99'223, crc32c(data.data(), 777)) == crc32c(data.data(), data.size()));
}

void test_threads() {
  const size_t before = num_threads();
  std::vector<float> ones(40 * kBlockNumel + 3, 1.0f);
  const auto sum = [&] { return sum_of_squares(ones.data(), Dtype::float32, ones.size()); };
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        CHECK(sum() == static_cast<double>(ones.size()));
      }
    });
  }
  for (const size_t num : {1, 7, 2, 3}) {  // while others call
    set_num_threads(num);
    CHECK(sum() == static_cast<double>(ones.size()));
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
  set_num_threads(before);
}

}  // namespace

int main() {
  test_levels_agree();
  test_all_halves_survive_a_round_trip();
  test_matching_sqrt();
  test_crc32c();
  test_threads();
}
