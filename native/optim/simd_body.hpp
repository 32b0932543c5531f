// The vector kernels, written once over a `Simd` type that each instruction set defines before it includes this file.
// No include guard: each including file gets its own copies, in an unnamed namespace. They must not share inline
// functions with other files: the linker would keep one copy, perhaps the one with instructions this CPU lacks.
// Simd: Floats, Doubles, kWidth (floats per vector), and the operations used below.

namespace lightning_ssd::optim {
namespace {

using Floats = Simd::Floats;
constexpr size_t kWidth = Simd::kWidth;
constexpr size_t kPassNumel = 1024;  // before and after an external function, which so finds its input in L1

struct Full {  // number of lanes of a whole vector, known when compiling
  constexpr operator size_t() const { return kWidth; }
};

template <class Step>
[[gnu::always_inline]] inline void each_vector(size_t begin, size_t end, Step step) {
  size_t i = begin;
  for (; i + kWidth <= end; i += kWidth) {
    step(i, Full{});
  }
  if (i < end) {
    step(i, end - i);
  }
}

template <Dtype kDtype>
[[gnu::always_inline]] inline Floats load_full(const void* from) {
  if constexpr (kDtype == Dtype::float32) {
    return Simd::load(static_cast<const float*>(from));
  } else if constexpr (kDtype == Dtype::bfloat16) {
    return Simd::load_bfloat16(static_cast<const uint16_t*>(from));
  } else {
    return Simd::load_float16(static_cast<const uint16_t*>(from));
  }
}

template <Dtype kDtype>
[[gnu::always_inline]] inline void store_full(void* to, Floats value) {
  if constexpr (kDtype == Dtype::float32) {
    Simd::store(static_cast<float*>(to), value);
  } else if constexpr (kDtype == Dtype::bfloat16) {
    Simd::store_bfloat16(static_cast<uint16_t*>(to), value);
  } else {
    Simd::store_float16(static_cast<uint16_t*>(to), value);
  }
}

// A partial vector goes through a buffer, so that no lane is ever rounded by other instructions than a whole one.
template <Dtype kDtype, class Lanes>
[[gnu::always_inline]] inline Floats load_lanes(const void* data, size_t i, Lanes lanes) {
  constexpr size_t nbytes = dtype_nbytes(kDtype);
  const char* from = static_cast<const char*>(data) + i * nbytes;
  if constexpr (__is_same(Lanes, Full)) {
    return load_full<kDtype>(from);
  } else {
    alignas(64) char buffer[kWidth * nbytes] = {};
    __builtin_memcpy(buffer, from, lanes * nbytes);
    return load_full<kDtype>(buffer);
  }
}

template <Dtype kDtype, class Lanes>
[[gnu::always_inline]] inline void store_lanes(void* data, size_t i, Lanes lanes, Floats value) {
  constexpr size_t nbytes = dtype_nbytes(kDtype);
  char* to = static_cast<char*>(data) + i * nbytes;
  if constexpr (__is_same(Lanes, Full)) {
    store_full<kDtype>(to, value);
  } else {
    alignas(64) char buffer[kWidth * nbytes];
    store_full<kDtype>(buffer, value);
    __builtin_memcpy(to, buffer, lanes * nbytes);
  }
}

constexpr Dtype kFloat = Dtype::float32;

template <Dtype kGrad, class Update, class Lanes>
[[gnu::always_inline]] inline Floats effective_grad(const Update& u, size_t i, Lanes lanes) {
  Floats grad = load_lanes<kGrad>(u.grad, i, lanes);
  if (u.grad_scale != 1.0f) {
    grad = Simd::mul(grad, Simd::set(u.grad_scale));
  }
  if (u.maximize) {
    grad = Simd::negate(grad);
  }
  if (u.has_penalty) {
    grad = Simd::fma(load_lanes<kFloat>(u.param, i, lanes), Simd::set(u.penalty), grad);
  }
  return grad;
}

[[gnu::always_inline]] inline Floats lerp(Floats start, Floats end, float weight) {
  const Floats difference = Simd::sub(end, start);
  if (__builtin_fabsf(weight) < 0.5f) {
    return Simd::fma(Simd::set(weight), difference, start);
  }
  return Simd::fma(Simd::set(weight - 1.0f), difference, end);
}

struct Moments {
  Floats exp_avg;
  Floats exp_avg_sq;
};

template <Dtype kGrad, class Lanes>
[[gnu::always_inline]] inline Moments update_moments(const AdamUpdate& u, size_t i, Lanes lanes) {
  const Floats grad = effective_grad<kGrad>(u, i, lanes);
  const Floats exp_avg = lerp(load_lanes<kFloat>(u.exp_avg, i, lanes), grad, u.weight1);
  const Floats decayed = Simd::mul(load_lanes<kFloat>(u.exp_avg_sq, i, lanes), Simd::set(u.beta2));
  const Floats exp_avg_sq = Simd::fma(Simd::mul(Simd::set(u.weight2), grad), grad, decayed);
  store_lanes<kFloat>(u.exp_avg, i, lanes, exp_avg);
  store_lanes<kFloat>(u.exp_avg_sq, i, lanes, exp_avg_sq);
  return {exp_avg, exp_avg_sq};
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
      return store_lanes<Dtype::bfloat16>(u.out, i, lanes, param);
    case Dtype::float16:
      return store_lanes<Dtype::float16>(u.out, i, lanes, param);
  }
}

template <class Lanes>
[[gnu::always_inline]] inline void update_param(const AdamUpdate& u, size_t i, Lanes lanes, Floats exp_avg,
                                                Floats root) {
  const Floats denominator = Simd::add(Simd::div(root, Simd::set(u.bias2_sqrt)), Simd::set(u.eps));
  const Floats numerator = Simd::mul(Simd::set(u.step_size_negative), exp_avg);
  Floats param = load_lanes<kFloat>(u.param, i, lanes);
  if (u.decay != 1.0f) {
    param = Simd::mul(param, Simd::set(u.decay));
  }
  emit(u, i, lanes, Simd::add(param, Simd::div(numerator, denominator)));
}

template <SqrtForm kForm>
[[gnu::always_inline]] inline Floats root_of(Floats value) {
  if constexpr (kForm == SqrtForm::refined) {
    return Simd::refined_sqrt(value);
  } else {
    return Simd::sqrt(value);
  }
}

template <Dtype kGrad, SqrtForm kForm>
void adam_in_one_pass(const AdamUpdate& u, size_t begin, size_t end) {
  each_vector(begin, end, [&u](size_t i, auto lanes) __attribute__((always_inline)) {
    const Moments moments = update_moments<kGrad>(u, i, lanes);
    update_param(u, i, lanes, moments.exp_avg, root_of<kForm>(moments.exp_avg_sq));
  });
}

template <Dtype kGrad>
void adam_around_external_sqrt(const AdamUpdate& u, size_t begin, size_t end) {
  alignas(64) float roots[kPassNumel];
  for (size_t first = begin; first < end; first += kPassNumel) {
    const size_t last = end - first < kPassNumel ? end : first + kPassNumel;
    each_vector(first, last,
                [&u](size_t i, auto lanes) __attribute__((always_inline)) { update_moments<kGrad>(u, i, lanes); });
    u.external_sqrt(static_cast<int64_t>(last - first), u.exp_avg_sq + first, roots, kExternalSqrtMode);
    each_vector(first, last, [&u, &roots, first](size_t i, auto lanes) __attribute__((always_inline)) {
      const Floats exp_avg = load_lanes<kFloat>(u.exp_avg, i, lanes);
      update_param(u, i, lanes, exp_avg, load_lanes<kFloat>(roots, i - first, lanes));
    });
  }
}

template <Dtype kGrad>
void adam_from(const AdamUpdate& u, size_t begin, size_t end) {
  switch (u.sqrt_form) {
    case SqrtForm::ieee:
      return adam_in_one_pass<kGrad, SqrtForm::ieee>(u, begin, end);
    case SqrtForm::refined:
      return adam_in_one_pass<kGrad, SqrtForm::refined>(u, begin, end);
    case SqrtForm::external:
      return adam_around_external_sqrt<kGrad>(u, begin, end);
  }
}

void adam(const AdamUpdate& u, size_t begin, size_t end) {
  switch (u.grad_dtype) {
    case Dtype::float32:
      return adam_from<Dtype::float32>(u, begin, end);
    case Dtype::bfloat16:
      return adam_from<Dtype::bfloat16>(u, begin, end);
    case Dtype::float16:
      return adam_from<Dtype::float16>(u, begin, end);
  }
}

template <Dtype kGrad>
void sgd_from(const SgdUpdate& u, size_t begin, size_t end) {
  each_vector(begin, end, [&u](size_t i, auto lanes) __attribute__((always_inline)) {
    Floats grad = effective_grad<kGrad>(u, i, lanes);
    if (u.momentum != nullptr) {
      Floats momentum = grad;
      if (!u.first_step) {
        const Floats decayed = Simd::mul(load_lanes<kFloat>(u.momentum, i, lanes), Simd::set(u.momentum_factor));
        momentum = Simd::fma(grad, Simd::set(u.grad_weight), decayed);
      }
      store_lanes<kFloat>(u.momentum, i, lanes, momentum);
      grad = u.nesterov ? Simd::fma(momentum, Simd::set(u.momentum_factor), grad) : momentum;
    }
    emit(u, i, lanes, Simd::fma(grad, Simd::set(u.lr_negative), load_lanes<kFloat>(u.param, i, lanes)));
  });
}

void sgd(const SgdUpdate& u, size_t begin, size_t end) {
  switch (u.grad_dtype) {
    case Dtype::float32:
      return sgd_from<Dtype::float32>(u, begin, end);
    case Dtype::bfloat16:
      return sgd_from<Dtype::bfloat16>(u, begin, end);
    case Dtype::float16:
      return sgd_from<Dtype::float16>(u, begin, end);
  }
}

template <Dtype kDtype>
void add_squares_of(const void* data, size_t begin, size_t end, double lanes[kNumLanes]) {
  constexpr size_t num_vectors = kNumLanes / kWidth;
  Simd::Doubles low[num_vectors];
  Simd::Doubles high[num_vectors];
  for (size_t k = 0; k < num_vectors; ++k) {
    low[k] = Simd::load_doubles(lanes + k * kWidth);
    high[k] = Simd::load_doubles(lanes + k * kWidth + kWidth / 2);
  }
  const auto add = [&](size_t k, Floats value) __attribute__((always_inline)) {
    low[k] = Simd::add_square(low[k], Simd::low_doubles(value));
    high[k] = Simd::add_square(high[k], Simd::high_doubles(value));
  };
  size_t i = begin;
  for (; i + kNumLanes <= end; i += kNumLanes) {
    for (size_t k = 0; k < num_vectors; ++k) {
      add(k, load_lanes<kDtype>(data, i + k * kWidth, Full{}));
    }
  }
  for (size_t k = 0; i < end; ++k, i += kWidth) {
    const size_t num = end - i < kWidth ? end - i : kWidth;  // lanes past it add +0
    add(k, load_lanes<kDtype>(data, i, num));
  }
  for (size_t k = 0; k < num_vectors; ++k) {
    Simd::store_doubles(lanes + k * kWidth, low[k]);
    Simd::store_doubles(lanes + k * kWidth + kWidth / 2, high[k]);
  }
}

void add_squares(const void* data, Dtype dtype, size_t begin, size_t end, double lanes[kNumLanes]) {
  switch (dtype) {
    case Dtype::float32:
      return add_squares_of<Dtype::float32>(data, begin, end, lanes);
    case Dtype::bfloat16:
      return add_squares_of<Dtype::bfloat16>(data, begin, end, lanes);
    case Dtype::float16:
      return add_squares_of<Dtype::float16>(data, begin, end, lanes);
  }
}

template <Dtype kDst, Dtype kSrc>
void convert_from(void* dst, const void* src, size_t begin, size_t end) {
  each_vector(begin, end, [dst, src](size_t i, auto lanes) __attribute__((always_inline)) {
    store_lanes<kDst>(dst, i, lanes, load_lanes<kSrc>(src, i, lanes));
  });
}

template <Dtype kDst>
void convert_to(void* dst, const void* src, Dtype src_dtype, size_t begin, size_t end) {
  switch (src_dtype) {
    case Dtype::float32:
      return convert_from<kDst, Dtype::float32>(dst, src, begin, end);
    case Dtype::bfloat16:
      return convert_from<kDst, Dtype::bfloat16>(dst, src, begin, end);
    case Dtype::float16:
      return convert_from<kDst, Dtype::float16>(dst, src, begin, end);
  }
}

void convert(void* dst, Dtype dst_dtype, const void* src, Dtype src_dtype, size_t begin, size_t end) {
  switch (dst_dtype) {
    case Dtype::float32:
      return convert_to<Dtype::float32>(dst, src, src_dtype, begin, end);
    case Dtype::bfloat16:
      return convert_to<Dtype::bfloat16>(dst, src, src_dtype, begin, end);
    case Dtype::float16:
      return convert_to<Dtype::float16>(dst, src, src_dtype, begin, end);
  }
}

void sqrt_array(SqrtForm form, const float* in, float* out, size_t num) {
  each_vector(0, num, [=](size_t i, auto lanes) __attribute__((always_inline)) {
    const Floats value = load_lanes<kFloat>(in, i, lanes);
    store_lanes<kFloat>(out, i, lanes,
                        form == SqrtForm::refined ? root_of<SqrtForm::refined>(value) : root_of<SqrtForm::ieee>(value));
  });
}

}  // namespace
}  // namespace lightning_ssd::optim
