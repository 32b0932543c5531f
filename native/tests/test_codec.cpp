// Each level of codecs against the scalar one, which is checked against what the forms promise.
// With the argument "exhaustive" all 2^32 words go through the split (a minute or two for each level).
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.hpp"
#include "codec/adam.hpp"
#include "codec/codec.hpp"
#include "optim/optim.hpp"
#include "optim/scalar_cast.hpp"

using namespace lightning_ssd::codec;

namespace {

constexpr uint32_t kSign = 0x80000000;

struct Random {  // xorshift
  uint64_t state = 88172645463325252ull;
  uint32_t bits() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
  }
};

std::vector<const Codecs*> all_codecs() {
  std::vector<const Codecs*> codecs = {&kScalarCodecs};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) {
    codecs.push_back(&kAvx2Codecs);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    codecs.push_back(&kAvx512Codecs);
  }
#elif defined(__aarch64__)
  codecs.push_back(&kNeonCodecs);
#endif
  return codecs;
}

bool is_nan(uint32_t word) { return (word & ~kSign) > 0x7f800000; }

struct Split {
  explicit Split(size_t num) : high(num), low(num), moment(num) {}
  std::vector<uint16_t> high, low;
  std::vector<uint32_t> moment;
};

// NaNs stay NaNs; every other word and every second moment comes back, and the upper half is torch's rounding.
void check_split(const Codecs& codecs, const std::vector<uint32_t>& words, const std::vector<uint32_t>& moments) {
  const size_t num = words.size();
  Split split(num);
  std::vector<uint32_t> master(num), exp_avg_sq(num);
  codecs.split_encode(words.data(), moments.data(), split.high.data(), split.low.data(), split.moment.data(), num);
  codecs.split_decode(split.high.data(), split.low.data(), split.moment.data(), master.data(), exp_avg_sq.data(), num);
  for (size_t i = 0; i < num; ++i) {
    CHECK(split.high[i] == lightning_ssd::optim::float_to_bfloat16(std::bit_cast<float>(words[i])));
    CHECK(is_nan(words[i]) ? is_nan(master[i]) : master[i] == words[i]);
    CHECK(exp_avg_sq[i] == (moments[i] & ~kSign));
  }
  codecs.nudged_encode(words.data(), split.high.data(), split.low.data(), num);
  codecs.nudged_decode(split.high.data(), split.low.data(), master.data(), num);
  for (size_t i = 0; i < num; ++i) {
    CHECK(split.high[i] == lightning_ssd::optim::float_to_bfloat16(std::bit_cast<float>(words[i])));
    const bool is_tie_that_stays = (words[i] & 0x1ffff) == 0x08000;
    CHECK(is_nan(words[i]) ? is_nan(master[i]) : master[i] == words[i] - (is_tie_that_stays ? 1 : 0));
  }
}

void check_split_of_all_words(const Codecs& codecs) {
  constexpr size_t num = 1 << 16;
  std::vector<uint32_t> words(num), moments(num);
  for (uint32_t upper = 0; upper < 0x10000; ++upper) {
    for (uint32_t lower = 0; lower < num; ++lower) {
      words[lower] = upper << 16 | lower;
      moments[lower] = (lower * 2654435761u ^ upper) & ~kSign;
    }
    check_split(codecs, words, moments);
  }
}

std::vector<uint32_t> any_words(size_t num) {
  constexpr uint32_t special[] = {0,          kSign,      1,          0x7f800000, 0xff800000, 0x7fc00000, 0x7f7fffff,
                                  0x7f7f8000, 0xff7f8000, 0x00008000, 0x00018000, 0x80018000, 0x7f808001, 0x3f808000};
  Random random;
  std::vector<uint32_t> words;
  for (size_t i = 0; i < num; ++i) {
    const uint32_t word = random.bits();
    words.push_back(i % 5 == 0 ? special[word % std::size(special)] : i % 3 == 0 ? (word & 0xffff0000) | 0x8000 : word);
  }
  return words;
}

// What a training has: numbers of few powers of two, zeros, and now and then a huge one.
std::vector<uint32_t> usual_words(size_t num) {
  Random random;
  std::vector<uint32_t> words;
  for (size_t i = 0; i < num; ++i) {
    const uint32_t word = random.bits();
    const uint32_t usual = 0x30000000 + word % 0x08000000;
    words.push_back(i % 17 == 0 ? 0 : i % 601 == 0 ? 0x7f000000 : usual | (word & kSign));
  }
  return words;
}

struct Coded {
  explicit Coded(size_t num) : code(num), signed_code(num), scale(num), signed_scale(num), half(num), value(num) {}
  std::vector<uint8_t> code, signed_code;
  std::vector<uint32_t> scale, signed_scale;
  std::vector<uint16_t> half;
  std::vector<uint32_t> value, signed_value = value;
  bool operator==(const Coded&) const = default;
};

Coded coded(const Codecs& codecs, const std::vector<uint32_t>& words, Counter counter) {
  const size_t num = words.size();
  Coded c(num);
  codecs.log8_encode(words.data(), c.code.data(), c.scale.data(), num, counter);
  codecs.log8_decode(c.code.data(), c.scale.data(), c.value.data(), num);
  codecs.signed_log8_encode(words.data(), c.signed_code.data(), c.signed_scale.data(), num);
  codecs.signed_log8_decode(c.signed_code.data(), c.signed_scale.data(), c.signed_value.data(), num);
  codecs.stochastic_bfloat16(words.data(), c.half.data(), num, counter);
  return c;
}

void test_levels_agree() {
  for (const size_t num : {0, 1, 31, 127, 128, 129, 5000}) {
    for (const std::vector<uint32_t>& words : {any_words(num), usual_words(num)}) {
      for (const Codecs* codecs : all_codecs()) {
        check_split(*codecs, words, any_words(num));
        for (const uint64_t first : {uint64_t{0}, uint64_t{0xfffffff0}}) {  // the second passes 2^32
          const Counter counter{0x123456789abcdefull, first};
          CHECK(coded(*codecs, words, counter) == coded(kScalarCodecs, words, counter));
        }
      }
    }
  }
}

void test_errors_of_codes_are_bounded() {
  const std::vector<uint32_t> words = usual_words(1 << 16);
  const Coded c = coded(kScalarCodecs, words, {7, 0});
  for (size_t i = 0; i < words.size(); ++i) {
    const float value = std::fabs(std::bit_cast<float>(words[i]));
    const float largest = std::bit_cast<float>(c.scale[i / kBlockNumel]);
    const float moment = std::bit_cast<float>(c.value[i]);
    const float average = std::fabs(std::bit_cast<float>(c.signed_value[i]));
    CHECK(moment > 0);
    if (value >= largest * 0x1p-31f) {
      CHECK(std::fabs(moment - value) <= 0.126f * value);  // a whole step: it is rounded by chance
    }
    if (value >= largest * 0x1p-15f) {
      CHECK(std::fabs(average - value) <= 0.0626f * value);  // half a step
      CHECK((c.signed_value[i] & kSign) == (words[i] & kSign));
    } else {
      CHECK(std::fabs(average - value) <= largest * 0x1p-15f);
    }
    if (value == 0) {
      CHECK(average == 0);
    }
    const float half = std::bit_cast<float>(static_cast<uint32_t>(c.half[i]) << 16);
    CHECK(std::fabs(half - value) <= 0x1p-7f * value);
  }
}

void test_stochastic_rounding_is_right_on_average() {
  constexpr size_t num = 1 << 16;
  for (const float value : {1.001f, 1.1f, 0.7321f}) {
    std::vector<uint32_t> words(num, std::bit_cast<uint32_t>(value));
    for (size_t i = 0; i < num; i += kBlockNumel) {
      words[i] = std::bit_cast<uint32_t>(2.0f);  // the largest of each block
    }
    const Coded c = coded(kScalarCodecs, words, {99, 1000});
    double sum_of_codes = 0, sum_of_halves = 0;
    size_t count = 0;
    for (size_t i = 0; i < num; ++i) {
      if (i % kBlockNumel != 0) {
        sum_of_codes += std::bit_cast<float>(c.value[i]);
        sum_of_halves += std::bit_cast<float>(static_cast<uint32_t>(c.half[i]) << 16);
        ++count;
      }
    }
    // Five standard deviations of the mean.
    CHECK(std::fabs(sum_of_codes / static_cast<double>(count) - value) < 5 * 0.0625 / 256);
    CHECK(std::fabs(sum_of_halves / static_cast<double>(count) - value) < 5 * 0.00391 / 256);
  }
}

using lightning_ssd::optim::AdamUpdate;
using lightning_ssd::optim::Dtype;
using lightning_ssd::optim::SqrtForm;

AdamUpdate adam_update(const std::vector<float>& grad, float* param, float* exp_avg, float* exp_avg_sq) {
  return {
      .param = param,
      .grad = grad.data(),
      .grad_dtype = Dtype::float32,
      .exp_avg = exp_avg,
      .exp_avg_sq = exp_avg_sq,
      .out = nullptr,
      .out_dtype = Dtype::float32,
      .numel = grad.size(),
      .grad_scale = 1.0f,
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
      .sqrt_form = SqrtForm::ieee,
      .external_sqrt = nullptr,
      .set_external_threads = nullptr,
  };
}

struct Stored {
  explicit Stored(size_t num)
      : high(num), low(num), exp_avg(num), exp_avg_sq(num), scales(2, std::vector<uint32_t>(num / kBlockNumel + 1)) {}
  StoredAdam in(MomentForm form, uint64_t first) {
    return {.high = high.data(),
            .low = low.data(),
            .exp_avg = {exp_avg.data(), scales[0].data()},
            .exp_avg_sq = {exp_avg_sq.data(), scales[1].data()},
            .form = form,
            .counter = {3, first}};
  }
  bool operator==(const Stored&) const = default;
  std::vector<uint16_t> high, low;
  std::vector<uint32_t> exp_avg, exp_avg_sq;  // large enough for any form
  std::vector<std::vector<uint32_t>> scales;
};

std::vector<float> random_floats(size_t num, uint32_t seed) {
  Random random;
  random.state += seed;
  std::vector<float> numbers;
  for (size_t i = 0; i < num; ++i) {
    numbers.push_back((static_cast<float>(random.bits()) - 2147483648.0f) * 0x1p-31f);
  }
  return numbers;
}

// Three updates of a split state are those of float32 state, to the bit.
void test_adam_on_a_split_is_adam() {
  for (const size_t num : {1, 1023, 1025, 50'001}) {
    for (const std::string& level : lightning_ssd::optim::levels()) {
      CHECK(lightning_ssd::optim::set_level(level));
      std::vector<float> param = random_floats(num, 1), exp_avg(num), exp_avg_sq(num);
      Stored stored(num);
      for (size_t i = 0; i < num; ++i) {
        param[i] =
            i % 7 == 0 ? std::bit_cast<float>((std::bit_cast<uint32_t>(param[i]) & 0xffff0000) | 0x8000) : param[i];
      }
      kScalarCodecs.split_encode(reinterpret_cast<uint32_t*>(param.data()), stored.exp_avg_sq.data(),
                                 stored.high.data(), stored.low.data(), stored.exp_avg_sq.data(), num);
      for (uint32_t step = 0; step < 3; ++step) {
        const std::vector<float> grad = random_floats(num, 100 + step);
        lightning_ssd::optim::adam(adam_update(grad, param.data(), exp_avg.data(), exp_avg_sq.data()));
        adam(adam_update(grad, nullptr, nullptr, nullptr), stored.in(MomentForm::float32, 0));
      }
      std::vector<float> master(num), moment(num);
      kScalarCodecs.split_decode(stored.high.data(), stored.low.data(), stored.exp_avg_sq.data(),
                                 reinterpret_cast<uint32_t*>(master.data()), reinterpret_cast<uint32_t*>(moment.data()),
                                 num);
      CHECK(master == param);
      CHECK(moment == exp_avg_sq);
      CHECK(std::memcmp(stored.exp_avg.data(), exp_avg.data(), num * sizeof(float)) == 0);
    }
  }
}

// The narrow forms: the same bits at every level, for any number of threads, and cut anywhere between blocks.
void test_narrow_adam_does_not_depend_on_how_it_runs() {
  constexpr size_t num = 40'001, cut = 24 * kBlockNumel * 5;
  const std::vector<float> grad = random_floats(num, 5);
  const std::vector<float> rest(grad.begin() + cut, grad.end()), begin(grad.begin(), grad.begin() + cut);
  for (const MomentForm form : {MomentForm::bfloat16, MomentForm::log8}) {
    const size_t nbytes = form == MomentForm::log8 ? 1 : 2;
    CHECK(lightning_ssd::optim::set_level("scalar"));
    Stored expected(num);
    for (int step = 0; step < 3; ++step) {
      adam(adam_update(grad, nullptr, nullptr, nullptr), expected.in(form, 0));
    }
    for (const std::string& level : lightning_ssd::optim::levels()) {
      CHECK(lightning_ssd::optim::set_level(level));
      Stored stored(num);
      for (int step = 0; step < 3; ++step) {
        StoredAdam all = stored.in(form, 0);
        adam(adam_update(begin, nullptr, nullptr, nullptr), all);
        all.high += cut;
        all.low += cut;
        all.counter.first += cut;
        for (Moment* moment : {&all.exp_avg, &all.exp_avg_sq}) {
          moment->data = static_cast<char*>(moment->data) + cut * nbytes;
          moment->scale += cut / kBlockNumel;
        }
        adam(adam_update(rest, nullptr, nullptr, nullptr), all);
      }
      CHECK(stored == expected);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  test_levels_agree();
  test_errors_of_codes_are_bounded();
  test_stochastic_rounding_is_right_on_average();
  test_adam_on_a_split_is_adam();
  test_narrow_adam_does_not_depend_on_how_it_runs();
  if (argc > 1 && std::string(argv[1]) == "exhaustive") {
    for (const Codecs* codecs : all_codecs()) {
      check_split_of_all_words(*codecs);
      std::printf("%s: all words\n", codecs->name);
    }
  }
}
