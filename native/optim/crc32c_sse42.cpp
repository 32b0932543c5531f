#include <nmmintrin.h>

#include "optim/crc32c.hpp"

namespace lightning_ssd::optim {
namespace {

struct Crc {
  static uint32_t word(uint32_t state, uint64_t value) { return static_cast<uint32_t>(_mm_crc32_u64(state, value)); }
  static uint32_t byte(uint32_t state, unsigned char value) { return _mm_crc32_u8(state, value); }
};

}  // namespace
}  // namespace lightning_ssd::optim

#include "optim/crc32c_body.hpp"

namespace lightning_ssd::optim {

uint32_t crc32c_sse42(uint32_t state, const unsigned char* data, size_t nbytes) {
  return hardware_crc32c(state, data, nbytes);
}

}  // namespace lightning_ssd::optim
