// CRC32C (Castagnoli, reflected, as in iSCSI), by the CPU's instructions if it has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lightning_ssd::optim {

// CRC of nbytes bytes at data, continuing from the CRC of the bytes before; 0 starts.
uint32_t crc32c(const void* data, size_t nbytes, uint32_t initial = 0);

// The same for one implementation, on the raw register (not inverted before and after).
using Crc32cRegister = uint32_t (*)(uint32_t state, const unsigned char* data, size_t nbytes);
uint32_t crc32c_software(uint32_t state, const unsigned char* data, size_t nbytes);
uint32_t crc32c_sse42(uint32_t state, const unsigned char* data, size_t nbytes);
uint32_t crc32c_vpclmul(uint32_t state, const unsigned char* data, size_t nbytes);
uint32_t crc32c_neon(uint32_t state, const unsigned char* data, size_t nbytes);

struct Crc32cVariant {
  std::string name;
  Crc32cRegister crc;
};
std::vector<Crc32cVariant> crc32c_variants();  // of this CPU, slowest first, beginning with the software one

// [Note: three streams] The instruction takes one 8-byte word per cycle but needs three cycles for a result, so three
// stretches of equal length run side by side. The CRC is linear: the register of an earlier stretch is moved past the
// bytes of the later ones by a table of its length, then they are added (xor).
inline constexpr size_t kLongStretch = 8192;
inline constexpr size_t kShortStretch = 256;
using ShiftTable = std::array<std::array<uint32_t, 256>, 4>;  // of the register's four bytes
extern const ShiftTable kLongShift;                           // past kLongStretch zero bytes
extern const ShiftTable kShortShift;

inline constexpr uint32_t kCrc32cPolynomial = 0x82f63b78;

}  // namespace lightning_ssd::optim
