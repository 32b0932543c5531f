// Forms of the state on disk, as arithmetic on the bits of arrays: the table of functions that each instruction set
// fills in. No Python, no torch. All of it is integer arithmetic, so every level gives the bits of the scalar one.
//
// [Note: split] A float32 master w is kept in two 16-bit halves: `high` is w rounded to bfloat16 as torch rounds (to
// the nearest, ties to even), which is what compute reads, and `low` is the lower half of w. Whether `high` was rounded
// up follows from `low`: it was above 0x8000. At 0x8000, a tie, it depends on the bit before; that one bit is kept in
// the sign of Adam's second moment, which is never negative. So the pair is exact for every w.
//
// [Note: nudged split] Where the second moment is not kept exactly, there is no sign to borrow: a tie that was not
// rounded up is kept as 0x7fff, one unit in the last place of w nearer to zero. `high` is still what torch's rounding
// gives.
//
// [Note: logarithmic codes] The bits of a positive float, read as an integer, grow with its logarithm (piecewise
// linearly). A code counts steps of 2^20 of them, an eighth of a power of two, downwards from the largest number of a
// block: 256 steps reach 32 powers of two below it. Second moments never become zero: they divide. Zero has a code of
// its own in first moments, which have a sign and 7 bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lightning_ssd::codec {

inline constexpr size_t kBlockNumel = 128;  // elements under one float maximum

// Counter of stochastic rounding: element i of a call is rounded by the hash of (key, first + i).
struct Counter {
  uint64_t key;
  uint64_t first;
};

struct Codecs {
  const char* name;
  // [Note: split]; `moment` has the borrowed sign in and out of the file's form, `exp_avg_sq` never.
  void (*split_decode)(const uint16_t* high, const uint16_t* low, const uint32_t* moment, uint32_t* master,
                       uint32_t* exp_avg_sq, size_t num);
  void (*split_encode)(const uint32_t* master, const uint32_t* exp_avg_sq, uint16_t* high, uint16_t* low,
                       uint32_t* moment, size_t num);
  // [Note: nudged split]
  void (*nudged_decode)(const uint16_t* high, const uint16_t* low, uint32_t* master, size_t num);
  void (*nudged_encode)(const uint32_t* master, uint16_t* high, uint16_t* low, size_t num);
  // bfloat16 of non-negative numbers, rounded up or down by chance in proportion to the distance.
  void (*stochastic_bfloat16)(const uint32_t* value, uint16_t* out, size_t num, Counter counter);
  // [Note: logarithmic codes] of whole blocks; the last may be shorter. `scale` has one float a block.
  void (*log8_decode)(const uint8_t* code, const uint32_t* scale, uint32_t* value, size_t num);
  void (*log8_encode)(const uint32_t* value, uint8_t* code, uint32_t* scale, size_t num, Counter counter);
  void (*signed_log8_decode)(const uint8_t* code, const uint32_t* scale, uint32_t* value, size_t num);
  void (*signed_log8_encode)(const uint32_t* value, uint8_t* code, uint32_t* scale, size_t num);
};

extern const Codecs kScalarCodecs;
extern const Codecs kAvx2Codecs;
extern const Codecs kAvx512Codecs;
extern const Codecs kNeonCodecs;

}  // namespace lightning_ssd::codec
