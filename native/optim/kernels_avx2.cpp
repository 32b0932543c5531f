// AVX2 with FMA and F16C: eight floats at a time.
#include <immintrin.h>

#include "optim/kernels.hpp"

namespace lightning_ssd::optim {
namespace {

struct Simd {
  using Floats = __m256;
  using Doubles = __m256d;
  static constexpr size_t kWidth = 8;

  static Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
  static Floats set(float value) { return _mm256_set1_ps(value); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats negate(Floats a) { return _mm256_xor_ps(a, set(-0.0f)); }
  static Floats sqrt(Floats a) { return _mm256_sqrt_ps(a); }

  // For [Note: MKL's square roots] in scalar.cpp.
  static constexpr bool has(SqrtForm form) { return form == SqrtForm::mkl_sse || form == SqrtForm::mkl_avx2; }
  static Floats reciprocal_root(Floats value) { return _mm256_rsqrt_ps(value); }
  static bool any_outside(FloatBits range, Floats value) { return _mm256_movemask_ps(outside(range, value)) != 0; }
  static Floats where_outside(FloatBits range, Floats value, Floats then, Floats otherwise) {
    return _mm256_blendv_ps(otherwise, then, outside(range, value));
  }
  static Floats outside(FloatBits range, Floats value) {
    const __m256i bits = _mm256_castps_si256(value);  // signed: negative numbers are below any positive one
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(range.first)), bits);
    const __m256i above = _mm256_cmpgt_epi32(bits, _mm256_set1_epi32(static_cast<int>(range.last - 1)));
    return _mm256_castsi256_ps(_mm256_or_si256(below, above));
  }

  static Floats load_bfloat16(const uint16_t* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Floats load_float16(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }

  using Halves = __m128i;
  static Halves bfloat16_of(Floats value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i wide = _mm256_srli_epi32(_mm256_or_si256(rounded, nan), 16);
    const __m128i low = _mm256_castsi256_si128(wide);
    const __m128i high = _mm256_extracti128_si256(wide, 1);
    return _mm_packus_epi32(low, high);
  }
  static Halves float16_of(Floats value) {
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static void store_halves(uint16_t* to, Halves halves) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves); }
  static void stream_halves(uint16_t* to, Halves halves) { _mm_stream_si128(reinterpret_cast<__m128i*>(to), halves); }
  static void fence_streams() { _mm_sfence(); }

  // kWidth bfloat16 as kWidth / 2 words of two.
  static __m128i load_words(const uint16_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
  static Doubles low_bfloat16s(__m128i words) { return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(words, 16))); }
  static Doubles high_bfloat16s(__m128i words) {
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_and_si128(words, _mm_set1_epi32(-0x10000))));
  }
  static Doubles load_doubles(const double* from) { return _mm256_loadu_pd(from); }
  static void store_doubles(double* to, Doubles value) { _mm256_storeu_pd(to, value); }
  static Doubles low_doubles(Floats value) { return _mm256_cvtps_pd(_mm256_castps256_ps128(value)); }
  static Doubles high_doubles(Floats value) { return _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1)); }
  static Doubles add_square(Doubles sum, Doubles value) { return _mm256_fmadd_pd(value, value, sum); }  // exact product
};

}  // namespace
}  // namespace lightning_ssd::optim

#include "optim/simd_body.hpp"

namespace lightning_ssd::optim {

const Kernels kAvx2Kernels = {"avx2", adam, sgd, add_squares, convert, sqrt_array, &codec::kAvx2Codecs};

}  // namespace lightning_ssd::optim
