// AVX-512: sixteen floats at a time. VCVTNEPS2BF16 is not used: it flushes denormals, torch's cast does not.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 header, where a result has no old value
#endif
#include <immintrin.h>

#include "optim/kernels.hpp"

namespace lightning_ssd::optim {
namespace {

struct Simd {
  using Floats = __m512;
  using Doubles = __m512d;
  static constexpr size_t kWidth = 16;

  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
  static Floats set(float value) { return _mm512_set1_ps(value); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats negate(Floats a) { return _mm512_xor_ps(a, set(-0.0f)); }
  static Floats sqrt(Floats a) { return _mm512_sqrt_ps(a); }

  // For [Note: MKL's square roots] in scalar.cpp.
  static constexpr bool has(SqrtForm) { return true; }
  // The estimate of the 256-bit instruction: VRSQRT14PS differs.
  static Floats reciprocal_root(Floats value) {
    const __m256 low = _mm256_rsqrt_ps(_mm512_castps512_ps256(value));
    const __m256 high = _mm256_rsqrt_ps(_mm512_extractf32x8_ps(value, 1));
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }
  static Floats reciprocal_root14(Floats value) { return _mm512_rsqrt14_ps(value); }
  static bool any_outside(FloatBits range, Floats value) { return outside(range, value) != 0; }
  static Floats where_outside(FloatBits range, Floats value, Floats then, Floats otherwise) {
    return _mm512_mask_blend_ps(outside(range, value), otherwise, then);
  }
  static __mmask16 outside(FloatBits range, Floats value) {
    const __m512i distance =
        _mm512_sub_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(static_cast<int>(range.first)));
    return _mm512_cmpge_epu32_mask(distance, _mm512_set1_epi32(static_cast<int>(range.last - range.first)));
  }

  static Floats load_bfloat16(const uint16_t* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Floats load_float16(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  using Halves = __m256i;
  static Halves bfloat16_of(Floats value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0xffff));
    return _mm512_cvtepi32_epi16(result);
  }
  static Halves float16_of(Floats value) {
    return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static void store_halves(uint16_t* to, Halves halves) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves); }
  static void stream_halves(uint16_t* to, Halves halves) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), halves);
  }
  static void fence_streams() { _mm_sfence(); }

  // kWidth bfloat16 as kWidth / 2 words of two.
  static __m256i load_words(const uint16_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static Doubles low_bfloat16s(__m256i words) {
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
  }
  static Doubles high_bfloat16s(__m256i words) {
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-0x10000))));
  }
  static Doubles load_doubles(const double* from) { return _mm512_loadu_pd(from); }
  static void store_doubles(double* to, Doubles value) { _mm512_storeu_pd(to, value); }
  static Doubles low_doubles(Floats value) { return _mm512_cvtps_pd(_mm512_castps512_ps256(value)); }
  static Doubles high_doubles(Floats value) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1)); }
  static Doubles add_square(Doubles sum, Doubles value) { return _mm512_fmadd_pd(value, value, sum); }  // exact product
};

}  // namespace
}  // namespace lightning_ssd::optim

#include "optim/simd_body.hpp"

namespace lightning_ssd::optim {

const Kernels kAvx512Kernels = {"avx512", adam, sgd, add_squares, convert, sqrt_array, &codec::kAvx512Codecs};

}  // namespace lightning_ssd::optim
