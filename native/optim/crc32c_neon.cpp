#include "optim/crc32c.hpp"

namespace lightning_ssd::optim {
namespace {

struct Crc {  // the instructions themselves: arm_acle.h declares its functions only where the whole file may use them
  static uint32_t word(uint32_t state, uint64_t value) {
    asm(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(state) : "r"(value));
    return state;
  }
  static uint32_t byte(uint32_t state, unsigned char value) {
    asm(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(state) : "r"(static_cast<uint32_t>(value)));
    return state;
  }
};

}  // namespace
}  // namespace lightning_ssd::optim

#include "optim/crc32c_body.hpp"

namespace lightning_ssd::optim {

uint32_t crc32c_neon(uint32_t state, const unsigned char* data, size_t nbytes) {
  return hardware_crc32c(state, data, nbytes);
}

}  // namespace lightning_ssd::optim
