// CRC32C by carry-less multiplication of 512 bits at a time; see [Note: folding].
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // see kernels_avx512.cpp
#endif
#include <immintrin.h>

#include "optim/crc32c.hpp"
#include "optim/prefetch.hpp"

namespace lightning_ssd::optim {
namespace {

// [Note: folding] Bytes are a polynomial over GF(2), and only its remainder modulo the CRC's counts. So 128 bits may be
// moved past D bits that follow them, and added to what is there, as their two halves times x^(D + 32) and x^(D - 32),
// each reduced to 32 bits. (In this reflected form the first bit is the highest power, a product comes out one bit too
// low, which the shift by one makes up for, and the 32 are the width of the constants.) Four vectors advance side by
// side, as a product takes several cycles; in the end they are folded into one, whose CRC is that of all.
constexpr size_t kVectorNbytes = 64;
constexpr size_t kNumVectors = 4;
constexpr size_t kStrideNbytes = kNumVectors * kVectorNbytes;

constexpr long long power_of_x(size_t exponent) {
  uint32_t power = 1u << 31;
  for (; exponent > 0; --exponent) {
    power = (power >> 1) ^ ((power & 1) ? kCrc32cPolynomial : 0);
  }
  return static_cast<long long>(power) << 1;
}

template <size_t kNbytes>
[[gnu::always_inline]] inline __m512i folded(__m512i value, __m512i following) {
  constexpr long long past_low = power_of_x(8 * kNbytes + 32);
  constexpr long long past_high = power_of_x(8 * kNbytes - 32);
  const __m512i factors = _mm512_broadcast_i32x4(_mm_set_epi64x(past_high, past_low));
  const __m512i low = _mm512_clmulepi64_epi128(value, factors, 0x00);
  const __m512i high = _mm512_clmulepi64_epi128(value, factors, 0x11);
  return _mm512_ternarylogic_epi64(low, high, following, 0x96);  // the sum of the three
}

[[gnu::always_inline]] inline __m512i vector_at(const unsigned char* data) { return _mm512_loadu_si512(data); }

}  // namespace

uint32_t crc32c_vpclmul(uint32_t state, const unsigned char* data, size_t nbytes) {
  if (nbytes < 2 * kStrideNbytes) {
    return crc32c_sse42(state, data, nbytes);
  }
  __m512i sum0 = _mm512_xor_si512(vector_at(data), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
  __m512i sum1 = vector_at(data + kVectorNbytes);
  __m512i sum2 = vector_at(data + 2 * kVectorNbytes);
  __m512i sum3 = vector_at(data + 3 * kVectorNbytes);
  data += kStrideNbytes;
  nbytes -= kStrideNbytes;
  for (; nbytes >= kStrideNbytes; data += kStrideNbytes, nbytes -= kStrideNbytes) {
    prefetch<kStrideNbytes>(data);
    sum0 = folded<kStrideNbytes>(sum0, vector_at(data));
    sum1 = folded<kStrideNbytes>(sum1, vector_at(data + kVectorNbytes));
    sum2 = folded<kStrideNbytes>(sum2, vector_at(data + 2 * kVectorNbytes));
    sum3 = folded<kStrideNbytes>(sum3, vector_at(data + 3 * kVectorNbytes));
  }
  __m512i sum = folded<2 * kVectorNbytes>(folded<kVectorNbytes>(sum0, sum1), folded<kVectorNbytes>(sum2, sum3));
  for (; nbytes >= kVectorNbytes; data += kVectorNbytes, nbytes -= kVectorNbytes) {
    sum = folded<kVectorNbytes>(sum, vector_at(data));
  }
  alignas(64) unsigned char last[kVectorNbytes];
  _mm512_store_si512(last, sum);
  return crc32c_sse42(crc32c_sse42(0, last, sizeof(last)), data, nbytes);
}

}  // namespace lightning_ssd::optim
