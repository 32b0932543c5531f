// The functions of the table, as loops that compilers turn into the vector instructions of the including file's flags.
// No include guard, and all in an unnamed namespace: each including file gets its own copies (see optim/simd_body.hpp).
#include "codec/codec.hpp"
#include "codec/random_bits.hpp"

namespace lightning_ssd::codec {
namespace {

constexpr uint32_t kInfinity = 0x7f800000;
constexpr uint32_t kSign = 0x80000000;
constexpr uint32_t kHalf = 0x8000;  // of the lower half: a tie
constexpr uint32_t kCodeShift = 20;

[[gnu::always_inline]] inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
[[gnu::always_inline]] inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }

[[gnu::always_inline]] inline uint32_t is_number(uint32_t word) { return (word & ~kSign) <= kInfinity ? 1u : 0u; }

// torch's rounding to bfloat16; every NaN becomes 0xffff.
[[gnu::always_inline]] inline uint32_t rounded(uint32_t word) {
  const uint32_t nearest = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  return (word & ~kSign) > kInfinity ? 0xffff : nearest;
}

// The word whose upper half was rounded, up if `went_up`, to `high`. The upper half of a NaN is left.
[[gnu::always_inline]] inline uint32_t joined(uint32_t high, uint32_t low, uint32_t went_up) {
  return (high - (went_up & is_number(high << 16))) << 16 | low;
}

void split_decode(const uint16_t* __restrict high, const uint16_t* __restrict low, const uint32_t* moment,
                  uint32_t* __restrict master, uint32_t* exp_avg_sq, size_t num) {
  for (size_t i = 0; i < num; ++i) {
    const uint32_t borrowed = moment[i] >> 31;
    const uint32_t went_up = (low[i] + borrowed) > kHalf ? 1u : 0u;
    master[i] = joined(high[i], low[i], went_up);
    exp_avg_sq[i] = moment[i] & ~kSign;
  }
}

void split_encode(const uint32_t* __restrict master, const uint32_t* exp_avg_sq, uint16_t* __restrict high,
                  uint16_t* __restrict low, uint32_t* moment, size_t num) {
  for (size_t i = 0; i < num; ++i) {
    const uint32_t upper = rounded(master[i]);
    const uint32_t lower = master[i] & 0xffff;
    const uint32_t tie_went_up = (lower == kHalf ? 1u : 0u) & (master[i] >> 16) & is_number(master[i]);  // it was odd
    high[i] = static_cast<uint16_t>(upper);
    low[i] = static_cast<uint16_t>(lower);
    moment[i] = (exp_avg_sq[i] & ~kSign) | tie_went_up << 31;
  }
}

void nudged_decode(const uint16_t* __restrict high, const uint16_t* __restrict low, uint32_t* __restrict master,
                   size_t num) {
  for (size_t i = 0; i < num; ++i) {
    master[i] = joined(high[i], low[i], low[i] >= kHalf ? 1u : 0u);
  }
}

void nudged_encode(const uint32_t* __restrict master, uint16_t* __restrict high, uint16_t* __restrict low, size_t num) {
  for (size_t i = 0; i < num; ++i) {
    const uint32_t lower = master[i] & 0xffff;
    const uint32_t tie_stayed = (lower == kHalf ? 1u : 0u) & ~(master[i] >> 16) & is_number(master[i]);
    high[i] = static_cast<uint16_t>(rounded(master[i]));
    low[i] = static_cast<uint16_t>(lower - tie_stayed);
  }
}

struct Key {
  explicit Key(Counter counter)
      : key_low(static_cast<uint32_t>(counter.key)),
        key_high(static_cast<uint32_t>(counter.key >> 32)),
        first_low(static_cast<uint32_t>(counter.first)),
        first_high(static_cast<uint32_t>(counter.first >> 32)) {}

  [[gnu::always_inline]] uint32_t bits(size_t i) const {
    const uint32_t index_low = first_low + static_cast<uint32_t>(i);
    const uint32_t carry = index_low < first_low ? 1u : 0u;
    return random_bits(key_low, key_high, index_low, first_high + carry);
  }

  uint32_t key_low, key_high, first_low, first_high;
};

void stochastic_bfloat16(const uint32_t* __restrict value, uint16_t* __restrict out, size_t num, Counter counter) {
  const Key key(counter);
  for (size_t i = 0; i < num; ++i) {
    const uint32_t word = value[i] & ~kSign;
    uint32_t upper = (word + (key.bits(i) & 0xffff)) >> 16;
    upper = max(upper, word != 0 ? 1u : 0u);                        // never to zero
    upper = min(upper, word < kInfinity ? 0x7f7fu : (word >> 16));  // a finite number stays finite
    out[i] = static_cast<uint16_t>(word > kInfinity ? 0x7fc0u : upper);
  }
}

template <class Block>
[[gnu::always_inline]] inline void each_block(size_t num, Block block) {
  for (size_t first = 0; first < num; first += kBlockNumel) {
    const size_t left = num - first;
    if (left >= kBlockNumel) {
      block(first, kBlockNumel);
    } else {
      block(first, left);
    }
  }
}

[[gnu::always_inline]] inline uint32_t largest(const uint32_t* value, size_t num) {
  uint32_t most = 0;
  for (size_t i = 0; i < num; ++i) {
    most = max(most, value[i] & ~kSign);
  }
  return most;
}

void log8_decode(const uint8_t* __restrict code, const uint32_t* __restrict scale, uint32_t* __restrict value,
                 size_t num) {
  each_block(num, [=](size_t first, size_t numel) __attribute__((always_inline)) {
    const uint32_t most = scale[first / kBlockNumel];
    const uint32_t least = most != 0 ? 1u : 0u;
    for (size_t i = first; i < first + numel; ++i) {
      const uint32_t below = static_cast<uint32_t>(code[i]) << kCodeShift;
      value[i] = max(most - min(below, most), least);
    }
  });
}

void log8_encode(const uint32_t* __restrict value, uint8_t* __restrict code, uint32_t* __restrict scale, size_t num,
                 Counter counter) {
  const Key key(counter);
  each_block(num, [=](size_t first, size_t numel) __attribute__((always_inline)) {
    const uint32_t most = largest(value + first, numel);
    scale[first / kBlockNumel] = most;
    for (size_t i = first; i < first + numel; ++i) {
      const uint32_t below = most - (value[i] & ~kSign);
      const uint32_t chance = key.bits(i) & ((1u << kCodeShift) - 1);
      code[i] = static_cast<uint8_t>(min((below + chance) >> kCodeShift, 255));
    }
  });
}

constexpr uint32_t kZeroCode = 127;
constexpr uint32_t kLastCode = 126;

void signed_log8_decode(const uint8_t* __restrict code, const uint32_t* __restrict scale, uint32_t* __restrict value,
                        size_t num) {
  each_block(num, [=](size_t first, size_t numel) __attribute__((always_inline)) {
    const uint32_t most = scale[first / kBlockNumel];
    for (size_t i = first; i < first + numel; ++i) {
      const uint32_t magnitude = code[i] & 0x7f;
      const uint32_t below = magnitude << kCodeShift;
      const uint32_t bits = magnitude == kZeroCode ? 0u : most - min(below, most);
      value[i] = bits | static_cast<uint32_t>(code[i] & 0x80) << 24;
    }
  });
}

void signed_log8_encode(const uint32_t* __restrict value, uint8_t* __restrict code, uint32_t* __restrict scale,
                        size_t num) {
  constexpr uint32_t kToZero = (kLastCode << kCodeShift) + (1u << 23);  // below half of the smallest number
  each_block(num, [=](size_t first, size_t numel) __attribute__((always_inline)) {
    const uint32_t most = largest(value + first, numel);
    scale[first / kBlockNumel] = most;
    for (size_t i = first; i < first + numel; ++i) {
      const uint32_t magnitude = value[i] & ~kSign;
      const uint32_t below = most - magnitude;
      const uint32_t nearest = min((below + (1u << (kCodeShift - 1))) >> kCodeShift, kLastCode);
      const uint32_t is_zero = (magnitude == 0 ? 1u : 0u) | (below > kToZero ? 1u : 0u);
      code[i] = static_cast<uint8_t>((is_zero != 0 ? kZeroCode : nearest) | (value[i] >> 31) << 7);
    }
  });
}

}  // namespace
}  // namespace lightning_ssd::codec
