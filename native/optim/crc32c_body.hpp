// CRC32C over a `Crc` type with the CPU's instructions, defined before this file is included; see [Note: three
// streams]. No include guard, and all in an unnamed namespace: see simd_body.hpp.

namespace lightning_ssd::optim {
namespace {

inline uint64_t word_at(const unsigned char* data) {
  uint64_t word;
  __builtin_memcpy(&word, data, sizeof(word));
  return word;
}

inline uint32_t moved(const ShiftTable& shift, uint32_t state) {
  const auto* table = reinterpret_cast<const uint32_t (*)[256]>(&shift);
  return table[0][state & 0xff] ^ table[1][(state >> 8) & 0xff] ^ table[2][(state >> 16) & 0xff] ^
         table[3][state >> 24];
}

uint32_t three_streams(uint32_t state, const unsigned char*& data, size_t& nbytes, size_t stretch,
                       const ShiftTable& shift) {
  while (nbytes >= 3 * stretch) {
    uint32_t first = state;
    uint32_t second = 0;
    uint32_t third = 0;
    for (size_t i = 0; i < stretch; i += 8) {
      first = Crc::word(first, word_at(data + i));
      second = Crc::word(second, word_at(data + stretch + i));
      third = Crc::word(third, word_at(data + 2 * stretch + i));
    }
    state = moved(shift, moved(shift, first) ^ second) ^ third;
    data += 3 * stretch;
    nbytes -= 3 * stretch;
  }
  return state;
}

uint32_t hardware_crc32c(uint32_t state, const unsigned char* data, size_t nbytes) {
  state = three_streams(state, data, nbytes, kLongStretch, kLongShift);
  state = three_streams(state, data, nbytes, kShortStretch, kShortShift);
  for (; nbytes >= 8; nbytes -= 8, data += 8) {
    state = Crc::word(state, word_at(data));
  }
  for (; nbytes > 0; --nbytes, ++data) {
    state = Crc::byte(state, *data);
  }
  return state;
}

}  // namespace
}  // namespace lightning_ssd::optim
