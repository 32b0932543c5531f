// The oracle: one element at a time, one rounding per line, in the order of torch.optim's for-loop path.
#include <cmath>

#include "optim/kernels.hpp"
#include "optim/scalar_cast.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lightning_ssd::optim {
namespace {

#if defined(__x86_64__)
// [Note: MKL's square roots] torch's sqrt is MKL's, which is not correctly rounded, and MKL has three by the CPU: one
// for CPUs that are not Intel's, one for Intel's with AVX2 and one for Intel's with AVX-512. Each starts from an
// estimate of the reciprocal root and refines it. Zeros, negatives, infinities and NaNs take the exact root, and so do
// denormals but in the last. Each was compared with MKL over all 2^32 floats, on an AMD EPYC (Zen 5) and on an Intel
// Xeon (with MKL_ENABLE_INSTRUCTIONS=AVX2 for the second); matching_sqrt compares again on each machine.

// Root and half reciprocal refined once, then the root by its residual; every operation rounds.
float mkl_sse_root(float value) {
  const float estimate = _mm_cvtss_f32(_mm_rsqrt_ss(_mm_set_ss(value)));
  const float root = value * estimate;
  const float half_reciprocal = estimate * 0.5f;
  const float error = 0.5f - root * half_reciprocal;
  const float root1 = root + root * error;
  const float half_reciprocal1 = half_reciprocal + half_reciprocal * error;
  const float residual = value - root1 * root1;
  return root1 + half_reciprocal1 * residual;
}

// The same, fused.
float mkl_avx2_root(float value) {
  const float estimate = _mm_cvtss_f32(_mm_rsqrt_ss(_mm_set_ss(value)));
  const float root = value * estimate;
  const float half_reciprocal = estimate * 0.5f;
  const float error = std::fma(-root, half_reciprocal, 0.5f);
  const float root1 = std::fma(root, error, root);
  const float half_reciprocal1 = std::fma(half_reciprocal, error, half_reciprocal);
  const float residual = std::fma(-root1, root1, value);
  return std::fma(half_reciprocal1, residual, root1);
}

// A better estimate, and the root by its residual, which must not underflow.
[[gnu::target("avx512f")]] float mkl_avx512_root(float value) {
  const bool is_tiny = std::bit_cast<uint32_t>(value) < plain_range(SqrtForm::mkl_avx512).first;
  value = is_tiny ? value * 0x1p64f : value;
  const __m128 wide = _mm_set_ss(value);
  const float estimate = _mm_cvtss_f32(_mm_rsqrt14_ss(wide, wide));
  const float root = value * estimate;
  const float half_reciprocal = estimate * 0.5f;
  const float residual = std::fma(-root, root, value);
  const float refined = std::fma(half_reciprocal, residual, root);
  return is_tiny ? refined * 0x1p-32f : refined;
}
#endif

float sqrt_by(SqrtForm form, float value) {
#if defined(__x86_64__)
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const FloatBits plain = plain_range(form);
  const bool is_plain = bits >= plain.first && bits < plain.last;
  if (form == SqrtForm::mkl_sse && is_plain) {
    return mkl_sse_root(value);
  }
  if (form == SqrtForm::mkl_avx2 && is_plain) {
    return mkl_avx2_root(value);
  }
  if (form == SqrtForm::mkl_avx512 && bits > 0 && bits < plain.last && __builtin_cpu_supports("avx512f")) {
    return mkl_avx512_root(value);
  }
#endif
  return std::sqrt(value);
}

void sqrt_array(SqrtForm form, const float* in, float* out, size_t num) {
  for (size_t i = 0; i < num; ++i) {
    out[i] = sqrt_by(form, in[i]);
  }
}

float root_of(const AdamUpdate& u, float value) {
  float root;
  if (u.sqrt_form == SqrtForm::external) {
    u.external_sqrt(1, &value, &root, kExternalSqrtMode);
  } else {
    root = sqrt_by(u.sqrt_form, value);
  }
  return root;
}

template <class Update>
float effective_grad(const Update& u, size_t i) {
  float grad = load(u.grad, u.grad_dtype, i);
  if (u.grad_scale != 1.0f) {
    grad = grad * u.grad_scale;
  }
  if (u.maximize) {
    grad = -grad;
  }
  if (u.has_penalty) {
    grad = std::fma(u.param[i], u.penalty, grad);
  }
  return grad;
}

float lerp(float start, float end, float weight) {
  const float difference = end - start;
  if (std::fabs(weight) < 0.5f) {
    return std::fma(weight, difference, start);
  }
  return std::fma(weight - 1.0f, difference, end);  // not the reverse signs: they would turn -0 into 0
}

void adam(const AdamUpdate& u, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    const float grad = effective_grad(u, i);
    float param = u.param[i];
    if (u.decay != 1.0f) {
      param = param * u.decay;
    }
    const float exp_avg = lerp(u.exp_avg[i], grad, u.weight1);
    float exp_avg_sq = u.exp_avg_sq[i] * u.beta2;
    const float weighted = u.weight2 * grad;
    exp_avg_sq = std::fma(weighted, grad, exp_avg_sq);
    float denominator = root_of(u, exp_avg_sq) / u.bias2_sqrt;
    denominator = denominator + u.eps;
    const float numerator = u.step_size_negative * exp_avg;
    const float step = numerator / denominator;
    param = param + step;
    u.exp_avg[i] = exp_avg;
    u.exp_avg_sq[i] = exp_avg_sq;
    u.param[i] = param;
    if (u.out != nullptr) {
      store(u.out, u.out_dtype, i, param);
    }
  }
}

void sgd(const SgdUpdate& u, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    float grad = effective_grad(u, i);
    if (u.momentum != nullptr) {
      float momentum = grad;
      if (!u.first_step) {
        const float decayed = u.momentum[i] * u.momentum_factor;
        momentum = std::fma(grad, u.grad_weight, decayed);
      }
      grad = u.nesterov ? std::fma(momentum, u.momentum_factor, grad) : momentum;
      u.momentum[i] = momentum;
    }
    const float param = std::fma(grad, u.lr_negative, u.param[i]);
    u.param[i] = param;
    if (u.out != nullptr) {
      store(u.out, u.out_dtype, i, param);
    }
  }
}

void add_squares(const void* data, Dtype dtype, size_t begin, size_t end, double lanes[kNumLanes]) {
  for (size_t i = begin; i < end; ++i) {
    const double value = load(data, dtype, i);
    lanes[(i - begin) % kNumLanes] += value * value;  // the product is exact
  }
}

void convert(void* dst, Dtype dst_dtype, const void* src, Dtype src_dtype, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    store(dst, dst_dtype, i, load(src, src_dtype, i));
  }
}

}  // namespace

const Kernels kScalarKernels = {"scalar", adam, sgd, add_squares, convert, sqrt_array, &codec::kScalarCodecs};

}  // namespace lightning_ssd::optim
