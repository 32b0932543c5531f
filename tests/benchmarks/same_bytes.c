/* The floor of the update: touches in place, in one pass, the bytes that AdamW touches, and computes next to nothing.
   Built by bench_kernels.py with the system's C compiler for the machine it runs on. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline float widen(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint16_t cut(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)(bits >> 16);
}

#define TOUCH(name, grad_t, read, emit)                                                                      \
  void name(float* restrict param, const grad_t* restrict grad, float* restrict exp_avg,                     \
            float* restrict exp_avg_sq, uint16_t* restrict out, size_t begin, size_t end) {                  \
    for (size_t i = begin; i < end; ++i) {                                                                   \
      const float g = read(grad[i]);                                                                         \
      param[i] += g;                                                                                         \
      exp_avg[i] += g;                                                                                       \
      exp_avg_sq[i] += g;                                                                                    \
      emit;                                                                                                  \
    }                                                                                                        \
  }

#define SAME(x) (x)
TOUCH(fp32, float, SAME, (void)out)
TOUCH(fp32_emit_bf16, float, SAME, out[i] = cut(param[i]))
TOUCH(bf16_emit_bf16, uint16_t, widen, out[i] = cut(param[i]))
