// The bits that decide a stochastic rounding: a hash of a key and a counter, so that they depend on neither threads nor
// chunks nor instruction sets.
#pragma once

#include "codec/codec.hpp"

namespace lightning_ssd::codec {

// Two rounds of multiplications and shifts (the constants are those of Chris Wellons' hash prospector, "triple32"
// family).
[[gnu::always_inline]] static inline uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x *= 0xd35a2d97u;
  x ^= x >> 15;
  return x;
}

[[gnu::always_inline]] static inline uint32_t random_bits(uint32_t key_low, uint32_t key_high, uint32_t index_low,
                                                          uint32_t index_high) {
  return mixed(mixed(index_low ^ key_low) ^ key_high ^ index_high * 0x9e3779b9u);
}

}  // namespace lightning_ssd::codec
