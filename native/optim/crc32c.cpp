#include "optim/crc32c.hpp"

#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace lightning_ssd::optim {
namespace {

using Matrix = std::array<uint32_t, 32>;  // over GF(2): the image of each bit of the register

constexpr uint32_t image_of(const Matrix& matrix, uint32_t vector) {
  uint32_t result = 0;
  for (size_t bit = 0; vector != 0; ++bit, vector >>= 1) {
    result ^= (vector & 1) ? matrix[bit] : 0;
  }
  return result;
}

constexpr ShiftTable shift_table(size_t nbytes) {  // nbytes is a power of two
  Matrix matrix{};
  matrix[0] = kCrc32cPolynomial;  // past one zero bit
  for (size_t bit = 1; bit < 32; ++bit) {
    matrix[bit] = 1u << (bit - 1);
  }
  for (size_t num_bits = 1; num_bits < nbytes * 8; num_bits *= 2) {
    Matrix squared{};
    for (size_t bit = 0; bit < 32; ++bit) {
      squared[bit] = image_of(matrix, matrix[bit]);
    }
    matrix = squared;
  }
  ShiftTable table{};
  for (size_t byte = 0; byte < 4; ++byte) {
    for (uint32_t value = 0; value < 256; ++value) {
      table[byte][value] = image_of(matrix, value << (8 * byte));
    }
  }
  return table;
}

using SliceTables = std::array<std::array<uint32_t, 256>, 8>;  // [k]: a byte followed by k zero bytes

constexpr SliceTables slice_tables() {
  SliceTables tables{};
  for (uint32_t value = 0; value < 256; ++value) {
    uint32_t state = value;
    for (int bit = 0; bit < 8; ++bit) {
      state = (state >> 1) ^ ((state & 1) ? kCrc32cPolynomial : 0);
    }
    tables[0][value] = state;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t value = 0; value < 256; ++value) {
      const uint32_t state = tables[k - 1][value];
      tables[k][value] = (state >> 8) ^ tables[0][state & 0xff];
    }
  }
  return tables;
}

constexpr SliceTables kSlices = slice_tables();

}  // namespace

constexpr ShiftTable kLongShift = shift_table(kLongStretch);
constexpr ShiftTable kShortShift = shift_table(kShortStretch);

uint32_t crc32c_software(uint32_t state, const unsigned char* data, size_t nbytes) {
  for (; nbytes >= 8; nbytes -= 8, data += 8) {
    uint32_t next = 0;
    for (size_t k = 0; k < 8; ++k) {
      const uint32_t byte = data[k] ^ (k < 4 ? (state >> (8 * k)) & 0xff : 0);
      next ^= kSlices[7 - k][byte];
    }
    state = next;
  }
  for (; nbytes > 0; --nbytes, ++data) {
    state = (state >> 8) ^ kSlices[0][(state ^ *data) & 0xff];
  }
  return state;
}

std::vector<Crc32cVariant> crc32c_variants() {
  std::vector<Crc32cVariant> variants = {{"software", crc32c_software}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("sse4.2")) {
    variants.push_back({"sse42", crc32c_sse42});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("vpclmulqdq")) {
      variants.push_back({"vpclmul", crc32c_vpclmul});
    }
  }
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long crc32_bit = 1ul << 7;  // HWCAP_CRC32
  if (getauxval(AT_HWCAP) & crc32_bit) {
    variants.push_back({"neon", crc32c_neon});
  }
#elif defined(__aarch64__) && defined(__APPLE__)
  variants.push_back({"neon", crc32c_neon});  // every arm64 Mac has it
#endif
  return variants;
}

uint32_t crc32c(const void* data, size_t nbytes, uint32_t initial) {
  static const Crc32cRegister fastest = crc32c_variants().back().crc;
  return ~fastest(~initial, static_cast<const unsigned char*>(data), nbytes);
}

}  // namespace lightning_ssd::optim
