// The oracle: one element at a time, each form by what it means and not by the shortest arithmetic.
#include <algorithm>
#include <cmath>

#include "codec/codec.hpp"
#include "codec/random_bits.hpp"
#include "optim/scalar_cast.hpp"

namespace lightning_ssd::codec {
namespace {

constexpr uint32_t kSign = 0x80000000;
constexpr uint16_t kTie = 0x8000;
constexpr uint32_t kStep = 1u << 20;  // between two logarithmic codes

uint32_t absolute(uint32_t word) { return word & ~kSign; }
bool is_nan(uint32_t word) { return absolute(word) > 0x7f800000; }
bool is_finite(uint32_t word) { return absolute(word) < 0x7f800000; }
uint16_t upper_half(uint32_t word) { return static_cast<uint16_t>(word >> 16); }
uint16_t lower_half(uint32_t word) { return static_cast<uint16_t>(word); }
uint32_t word_of(uint16_t upper, uint16_t lower) { return static_cast<uint32_t>(upper) << 16 | lower; }
uint16_t to_bfloat16(uint32_t word) { return optim::float_to_bfloat16(std::bit_cast<float>(word)); }

bool is_tie_that_goes_up(uint32_t word) {
  return !is_nan(word) && lower_half(word) == kTie && to_bfloat16(word) != upper_half(word);
}

// Of the two words with this lower half that may have been rounded to `high`, the one that was.
uint32_t unrounded(uint16_t high, uint16_t low, bool tie_went_up) {
  const uint32_t same_upper_half = word_of(high, low);
  if (is_nan(word_of(high, 0))) {
    return same_upper_half;
  }
  const uint32_t below = word_of(static_cast<uint16_t>(high - 1), low);
  const bool went_up = low == kTie ? tie_went_up : to_bfloat16(below) == high && !is_nan(below);
  return went_up ? below : same_upper_half;
}

void split_decode(const uint16_t* high, const uint16_t* low, const uint32_t* moment, uint32_t* master,
                  uint32_t* exp_avg_sq, size_t num) {
  for (size_t i = 0; i < num; ++i) {
    master[i] = unrounded(high[i], low[i], (moment[i] & kSign) != 0);
    exp_avg_sq[i] = absolute(moment[i]);
  }
}

void split_encode(const uint32_t* master, const uint32_t* exp_avg_sq, uint16_t* high, uint16_t* low, uint32_t* moment,
                  size_t num) {
  for (size_t i = 0; i < num; ++i) {
    high[i] = to_bfloat16(master[i]);
    low[i] = lower_half(master[i]);
    moment[i] = absolute(exp_avg_sq[i]) | (is_tie_that_goes_up(master[i]) ? kSign : 0);
  }
}

void nudged_decode(const uint16_t* high, const uint16_t* low, uint32_t* master, size_t num) {
  for (size_t i = 0; i < num; ++i) {
    master[i] = unrounded(high[i], low[i], true);
  }
}

void nudged_encode(const uint32_t* master, uint16_t* high, uint16_t* low, size_t num) {
  for (size_t i = 0; i < num; ++i) {
    const bool is_tie_that_stays =
        lower_half(master[i]) == kTie && !is_tie_that_goes_up(master[i]) && !is_nan(master[i]);
    high[i] = to_bfloat16(master[i]);
    low[i] = is_tie_that_stays ? static_cast<uint16_t>(kTie - 1) : lower_half(master[i]);
  }
}

uint32_t bits_at(Counter counter, size_t i) {
  const uint64_t index = counter.first + i;
  return random_bits(static_cast<uint32_t>(counter.key), static_cast<uint32_t>(counter.key >> 32),
                     static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32));
}

void stochastic_bfloat16(const uint32_t* value, uint16_t* out, size_t num, Counter counter) {
  for (size_t i = 0; i < num; ++i) {
    const uint32_t word = absolute(value[i]);
    if (is_nan(word)) {
      out[i] = 0x7fc0;
      continue;
    }
    const uint32_t chance = bits_at(counter, i) % 0x10000;
    uint16_t upper = upper_half(word);
    if (lower_half(word) + chance >= 0x10000) {
      upper += 1;
    }
    if (upper == 0 && word != 0) {
      upper = 1;  // never to zero
    }
    if (is_finite(word) && !is_finite(word_of(upper, 0))) {
      upper = 0x7f7f;  // a finite number stays finite
    }
    out[i] = upper;
  }
}

uint32_t largest_of_block(const uint32_t* value, size_t begin, size_t num) {
  uint32_t largest = 0;
  for (size_t i = begin; i < std::min(begin + kBlockNumel, num); ++i) {
    largest = std::max(largest, absolute(value[i]));
  }
  return largest;
}

uint32_t steps_below(uint32_t largest, uint32_t steps) {
  const uint64_t distance = uint64_t{steps} * kStep;
  return distance >= largest ? 0 : static_cast<uint32_t>(largest - distance);
}

void log8_decode(const uint8_t* code, const uint32_t* scale, uint32_t* value, size_t num) {
  for (size_t i = 0; i < num; ++i) {
    const uint32_t largest = scale[i / kBlockNumel];
    value[i] = steps_below(largest, code[i]);
    if (value[i] == 0 && largest != 0) {
      value[i] = 1;  // the smallest number, never zero
    }
  }
}

void log8_encode(const uint32_t* value, uint8_t* code, uint32_t* scale, size_t num, Counter counter) {
  for (size_t i = 0; i < num; ++i) {
    if (i % kBlockNumel == 0) {
      scale[i / kBlockNumel] = largest_of_block(value, i, num);
    }
    const uint32_t distance = scale[i / kBlockNumel] - absolute(value[i]);
    uint32_t steps = distance / kStep;
    if (distance % kStep + bits_at(counter, i) % kStep >= kStep) {
      steps += 1;
    }
    code[i] = static_cast<uint8_t>(std::min<uint32_t>(steps, 255));
  }
}

void signed_log8_decode(const uint8_t* code, const uint32_t* scale, uint32_t* value, size_t num) {
  for (size_t i = 0; i < num; ++i) {
    const uint32_t sign = code[i] >= 128 ? kSign : 0;
    const uint32_t steps = code[i] % 128;
    value[i] = sign | (steps == 127 ? 0 : steps_below(scale[i / kBlockNumel], steps));
  }
}

void signed_log8_encode(const uint32_t* value, uint8_t* code, uint32_t* scale, size_t num) {
  for (size_t i = 0; i < num; ++i) {
    if (i % kBlockNumel == 0) {
      scale[i / kBlockNumel] = largest_of_block(value, i, num);
    }
    const uint32_t magnitude = absolute(value[i]);
    const uint32_t distance = scale[i / kBlockNumel] - magnitude;
    uint32_t steps = distance / kStep + (distance % kStep >= kStep / 2 ? 1 : 0);
    if (magnitude == 0 || distance > 126 * kStep + (1u << 23)) {
      steps = 127;  // zero, or less than half of the smallest number
    } else if (steps > 126) {
      steps = 126;
    }
    code[i] = static_cast<uint8_t>(steps + (value[i] >= kSign ? 128 : 0));
  }
}

}  // namespace

const Codecs kScalarCodecs = {"scalar",           split_decode,        split_encode, nudged_decode,
                              nudged_encode,      stochastic_bfloat16, log8_decode,  log8_encode,
                              signed_log8_decode, signed_log8_encode};

}  // namespace lightning_ssd::codec
