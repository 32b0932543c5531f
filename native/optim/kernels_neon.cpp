// NEON on arm64: four floats at a time.
#include <arm_neon.h>

#include "optim/kernels.hpp"

namespace lightning_ssd::optim {
namespace {

struct Simd {
  using Floats = float32x4_t;
  using Doubles = float64x2_t;
  static constexpr size_t kWidth = 4;

  static Floats load(const float* from) { return vld1q_f32(from); }
  static void store(float* to, Floats value) { vst1q_f32(to, value); }
  static Floats set(float value) { return vdupq_n_f32(value); }
  static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
  static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats negate(Floats a) { return vnegq_f32(a); }
  static Floats sqrt(Floats a) { return vsqrtq_f32(a); }
  static constexpr bool has(SqrtForm) { return false; }  // none of MKL's, nor has scalar.cpp here

  static Floats load_bfloat16(const uint16_t* from) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16)); }
  static Floats load_float16(const uint16_t* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }

  using Halves = uint16x4_t;
  static Halves bfloat16_of(Floats value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t nan = vmvnq_u32(vceqq_f32(value, value));
    return vshrn_n_u32(vorrq_u32(rounded, nan), 16);
  }
  static Halves float16_of(Floats value) { return vreinterpret_u16_f16(vcvt_f16_f32(value)); }
  static void store_halves(uint16_t* to, Halves halves) { vst1_u16(to, halves); }
  static void stream_halves(uint16_t* to, Halves halves) { vst1_u16(to, halves); }  // no intrinsic for it
  static void fence_streams() {}

  // kWidth bfloat16 as kWidth / 2 words of two.
  static uint32x2_t load_words(const uint16_t* from) { return vreinterpret_u32_u16(vld1_u16(from)); }
  static Doubles low_bfloat16s(uint32x2_t words) { return vcvt_f64_f32(vreinterpret_f32_u32(vshl_n_u32(words, 16))); }
  static Doubles high_bfloat16s(uint32x2_t words) {
    return vcvt_f64_f32(vreinterpret_f32_u32(vand_u32(words, vdup_n_u32(0xffff0000))));
  }
  static Doubles load_doubles(const double* from) { return vld1q_f64(from); }
  static void store_doubles(double* to, Doubles value) { vst1q_f64(to, value); }
  static Doubles low_doubles(Floats value) { return vcvt_f64_f32(vget_low_f32(value)); }
  static Doubles high_doubles(Floats value) { return vcvt_high_f64_f32(value); }
  static Doubles add_square(Doubles sum, Doubles value) { return vfmaq_f64(sum, value, value); }  // exact product
};

}  // namespace
}  // namespace lightning_ssd::optim

#include "optim/simd_body.hpp"

namespace lightning_ssd::optim {

const Kernels kNeonKernels = {"neon", adam, sgd, add_squares, convert, sqrt_array, &codec::kNeonCodecs};

}  // namespace lightning_ssd::optim
