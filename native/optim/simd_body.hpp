// The vector kernels, written once over a `Simd` type that each instruction set defines before it includes this file.
// No include guard: each including file gets its own copies, in an unnamed namespace. They must not share inline
// functions with other files: the linker would keep one copy, perhaps the one with instructions this CPU lacks.
// Simd: Floats, Doubles, Halves (kWidth 16-bit numbers), kWidth (floats per vector), and the operations used below.
#include "optim/simd_lanes.hpp"
#include "optim/simd_sqrt.hpp"
#include "optim/simd_sums.hpp"

namespace lightning_ssd::optim {
namespace {

constexpr size_t kPassNumel = 4096;  // between calls of an external function, whose input and result so stay in cache

template <Dtype kGrad, class Update, class Lanes>
[[gnu::always_inline]] inline Floats effective_grad(const Update& u, size_t i, Lanes lanes) {
  Floats grad = load_lanes<kGrad>(u.grad, i, lanes);
  if (u.grad_scale != 1.0f) {
    grad = Wide::mul(grad, Wide::set(u.grad_scale));
  }
  if (u.maximize) {
    grad = Wide::negate(grad);
  }
  if (u.has_penalty) {
    grad = Wide::fma(load_lanes<kFloat>(u.param, i, lanes), Wide::set(u.penalty), grad);
  }
  return grad;
}

[[gnu::always_inline]] inline Floats lerp(Floats start, Floats end, float weight) {
  const Floats difference = Wide::sub(end, start);
  if (__builtin_fabsf(weight) < 0.5f) {
    return Wide::fma(Wide::set(weight), difference, start);
  }
  return Wide::fma(Wide::set(weight - 1.0f), difference, end);
}

struct Moments {
  Floats exp_avg;
  Floats exp_avg_sq;
};

template <Dtype kGrad, class Lanes>
[[gnu::always_inline]] inline Moments moments_after(const AdamUpdate& u, size_t i, Lanes lanes) {
  const Floats grad = effective_grad<kGrad>(u, i, lanes);
  const Floats exp_avg = lerp(load_lanes<kFloat>(u.exp_avg, i, lanes), grad, u.weight1);
  const Floats decayed = Wide::mul(load_lanes<kFloat>(u.exp_avg_sq, i, lanes), Wide::set(u.beta2));
  return {exp_avg, Wide::fma(Wide::mul(Wide::set(u.weight2), grad), grad, decayed)};
}

template <class Lanes>
[[gnu::always_inline]] inline void store_moments(const AdamUpdate& u, size_t i, Lanes lanes, const Moments& moments) {
  store_lanes<kFloat>(u.exp_avg, i, lanes, moments.exp_avg);
  store_lanes<kFloat>(u.exp_avg_sq, i, lanes, moments.exp_avg_sq);
}

template <class Lanes>
[[gnu::always_inline]] inline Floats param_after(const AdamUpdate& u, size_t i, Lanes lanes, Floats exp_avg,
                                                 Floats root) {
  const Floats denominator = Wide::add(Wide::div(root, Wide::set(u.bias2_sqrt)), Wide::set(u.eps));
  const Floats numerator = Wide::mul(Wide::set(u.step_size_negative), exp_avg);
  Floats param = load_lanes<kFloat>(u.param, i, lanes);
  if (u.decay != 1.0f) {
    param = Wide::mul(param, Wide::set(u.decay));
  }
  return Wide::add(param, Wide::div(numerator, denominator));
}

template <class Update, class Lanes>
[[gnu::always_inline]] inline void emit(const Update& u, size_t i, Lanes lanes, Floats param) {
  store_lanes<kFloat>(u.param, i, lanes, param);
  if (u.out == nullptr) {
    return;
  }
  switch (u.out_dtype) {
    case Dtype::float32:
      return store_lanes<Dtype::float32>(u.out, i, lanes, param);
    case Dtype::bfloat16:
      return store_lanes<Dtype::bfloat16, Store::streamed>(u.out, i, lanes, param);
    case Dtype::float16:
      return store_lanes<Dtype::float16, Store::streamed>(u.out, i, lanes, param);
  }
}

template <Dtype kGrad, SqrtForm kForm>
void adam_in_one_pass(const AdamUpdate& update, size_t begin, size_t end) {
  const AdamUpdate u = update;  // ours, so that no store can change it: it stays in registers
  each_vector(begin, end, [&u](size_t i, auto lanes) __attribute__((always_inline)) {
    prefetch<kWidth * sizeof(float)>(u.param + i);
    prefetch<kWidth * sizeof(float)>(u.exp_avg + i);
    prefetch<kWidth * sizeof(float)>(u.exp_avg_sq + i);
    prefetch<kWidth * dtype_nbytes(kGrad)>(static_cast<const char*>(u.grad) + i * dtype_nbytes(kGrad));
    // Loads before stores: arrays often lie whole pages apart, and a load of equal low address bits waits for a store.
    const Moments moments = moments_after<kGrad>(u, i, lanes);
    const Floats param = param_after(u, i, lanes, moments.exp_avg, root_of<kForm>(moments.exp_avg_sq));
    store_moments(u, i, lanes, moments);
    emit(u, i, lanes, param);
  });
}

// `roots(num, in, out)` takes the square roots.
template <Dtype kGrad, class Roots>
void adam_in_passes(const AdamUpdate& u, size_t begin, size_t end, Roots roots) {
  alignas(64) float root[kPassNumel];
  for (size_t first = begin; first < end; first += kPassNumel) {
    const size_t last = end - first < kPassNumel ? end : first + kPassNumel;
    each_vector(first, last, [&u](size_t i, auto lanes) __attribute__((always_inline)) {
      store_moments(u, i, lanes, moments_after<kGrad>(u, i, lanes));
    });
    roots(last - first, u.exp_avg_sq + first, root);
    each_vector(first, last, [&u, &root, first](size_t i, auto lanes) __attribute__((always_inline)) {
      const Floats exp_avg = load_lanes<kFloat>(u.exp_avg, i, lanes);
      emit(u, i, lanes, param_after(u, i, lanes, exp_avg, load_lanes<kFloat>(root, i - first, lanes)));
    });
  }
}

template <Dtype kGrad>
void adam_around_external_sqrt(const AdamUpdate& u, size_t begin, size_t end) {
  // The function's own threads would spend their time waiting for each other: a pass takes some microseconds.
  const bool has_threads = u.set_external_threads != nullptr;
  const int num_before = has_threads ? u.set_external_threads(1) : 0;
  adam_in_passes<kGrad>(u, begin, end, [&u](size_t num, const float* in, float* out) {
    u.external_sqrt(static_cast<int64_t>(num), in, out, kExternalSqrtMode);
  });
  if (has_threads) {
    u.set_external_threads(num_before);
  }
}

template <Dtype kGrad, SqrtForm kForm>
void adam_by(const AdamUpdate& u, size_t begin, size_t end) {
  if constexpr (has(kForm)) {
    adam_in_one_pass<kGrad, kForm>(u, begin, end);
  } else {
    adam_in_passes<kGrad>(u, begin, end, scalar_roots<kForm>);
  }
}

template <Dtype kGrad>
void adam_from(const AdamUpdate& u, size_t begin, size_t end) {
  switch (u.sqrt_form) {
    case SqrtForm::ieee:
      return adam_by<kGrad, SqrtForm::ieee>(u, begin, end);
    case SqrtForm::mkl_sse:
      return adam_by<kGrad, SqrtForm::mkl_sse>(u, begin, end);
    case SqrtForm::mkl_avx2:
      return adam_by<kGrad, SqrtForm::mkl_avx2>(u, begin, end);
    case SqrtForm::mkl_avx512:
      return adam_by<kGrad, SqrtForm::mkl_avx512>(u, begin, end);
    case SqrtForm::external:
      return adam_around_external_sqrt<kGrad>(u, begin, end);
  }
}

void adam(const AdamUpdate& u, size_t begin, size_t end) {
  switch (u.grad_dtype) {
    case Dtype::float32:
      adam_from<Dtype::float32>(u, begin, end);
      break;
    case Dtype::bfloat16:
      adam_from<Dtype::bfloat16>(u, begin, end);
      break;
    case Dtype::float16:
      adam_from<Dtype::float16>(u, begin, end);
      break;
  }
  Simd::fence_streams();
}

template <Dtype kGrad>
void sgd_from(const SgdUpdate& update, size_t begin, size_t end) {
  const SgdUpdate u = update;  // see adam_in_one_pass
  each_vector(begin, end, [&u](size_t i, auto lanes) __attribute__((always_inline)) {
    Floats grad = effective_grad<kGrad>(u, i, lanes);
    if (u.momentum != nullptr) {
      Floats momentum = grad;
      if (!u.first_step) {
        const Floats decayed = Wide::mul(load_lanes<kFloat>(u.momentum, i, lanes), Wide::set(u.momentum_factor));
        momentum = Wide::fma(grad, Wide::set(u.grad_weight), decayed);
      }
      store_lanes<kFloat>(u.momentum, i, lanes, momentum);
      grad = u.nesterov ? Wide::fma(momentum, Wide::set(u.momentum_factor), grad) : momentum;
    }
    emit(u, i, lanes, Wide::fma(grad, Wide::set(u.lr_negative), load_lanes<kFloat>(u.param, i, lanes)));
  });
}

void sgd(const SgdUpdate& u, size_t begin, size_t end) {
  switch (u.grad_dtype) {
    case Dtype::float32:
      sgd_from<Dtype::float32>(u, begin, end);
      break;
    case Dtype::bfloat16:
      sgd_from<Dtype::bfloat16>(u, begin, end);
      break;
    case Dtype::float16:
      sgd_from<Dtype::float16>(u, begin, end);
      break;
  }
  Simd::fence_streams();
}

}  // namespace
}  // namespace lightning_ssd::optim
