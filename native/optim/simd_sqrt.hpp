// Square roots in each form that the instruction set has. Part of simd_body.hpp; see there.
namespace lightning_ssd::optim {
namespace {

// See [Note: MKL's square roots] in scalar.cpp. Templates over the instruction set, so that they are not compiled for
// one that lacks their instructions.
template <SqrtForm kForm, class Isa>
[[gnu::always_inline]] inline Floats plain_root(Floats value) {
  const Floats half = Wide::set(0.5f);
  if constexpr (kForm == SqrtForm::mkl_sse) {
    const Floats estimate = Wide::each(Isa::reciprocal_root, value);
    const Floats root = Wide::mul(value, estimate);
    const Floats half_reciprocal = Wide::mul(estimate, half);
    const Floats error = Wide::sub(half, Wide::mul(root, half_reciprocal));
    const Floats root1 = Wide::add(root, Wide::mul(root, error));
    const Floats half_reciprocal1 = Wide::add(half_reciprocal, Wide::mul(half_reciprocal, error));
    const Floats residual = Wide::sub(value, Wide::mul(root1, root1));
    return Wide::add(root1, Wide::mul(half_reciprocal1, residual));
  } else if constexpr (kForm == SqrtForm::mkl_avx2) {
    const Floats estimate = Wide::each(Isa::reciprocal_root, value);
    const Floats root = Wide::mul(value, estimate);
    const Floats half_reciprocal = Wide::mul(estimate, half);
    const Floats error = Wide::fma(Wide::negate(root), half_reciprocal, half);
    const Floats root1 = Wide::fma(root, error, root);
    const Floats half_reciprocal1 = Wide::fma(half_reciprocal, error, half_reciprocal);
    const Floats residual = Wide::fma(Wide::negate(root1), root1, value);
    return Wide::fma(half_reciprocal1, residual, root1);
  } else {
    const Floats estimate = Wide::each(Isa::reciprocal_root14, value);
    const Floats root = Wide::mul(value, estimate);
    const Floats half_reciprocal = Wide::mul(estimate, half);
    const Floats residual = Wide::fma(Wide::negate(root), root, value);
    return Wide::fma(half_reciprocal, residual, root);
  }
}

template <SqrtForm kForm, class Isa>
[[gnu::noinline]] Floats special_root(Floats value, Floats plain) {
  Floats root = Wide::sqrt(value);
  if constexpr (kForm == SqrtForm::mkl_avx512) {
    const Floats scaled = plain_root<kForm, Isa>(Wide::mul(value, Wide::set(0x1p64f)));
    const Floats tiny = Wide::mul(scaled, Wide::set(0x1p-32f));
    for (size_t k = 0; k < kParts; ++k) {
      root.part[k] = Isa::where_outside({1, plain_range(kForm).first}, value.part[k], root.part[k], tiny.part[k]);
    }
  }
  for (size_t k = 0; k < kParts; ++k) {
    root.part[k] = Isa::where_outside(plain_range(kForm), value.part[k], root.part[k], plain.part[k]);
  }
  return root;
}

template <SqrtForm kForm, class Isa = Simd>
[[gnu::always_inline]] inline Floats root_of(Floats value) {
  if constexpr (kForm == SqrtForm::ieee) {
    return Wide::sqrt(value);
  } else {
    const Floats plain = plain_root<kForm, Isa>(value);
    if (Isa::any_outside(plain_range(kForm), value.part[0]) || Isa::any_outside(plain_range(kForm), value.part[1]))
        [[unlikely]] {
      return special_root<kForm, Isa>(value, plain);
    }
    return plain;
  }
}

constexpr bool has(SqrtForm form) { return form == SqrtForm::ieee || Simd::has(form); }

// For a form whose instructions the instruction set lacks.
template <SqrtForm kForm>
void scalar_roots(size_t num, const float* in, float* out) {
  kScalarKernels.sqrt(kForm, in, out, num);
}

template <SqrtForm kForm>
void sqrt_array_by(const float* in, float* out, size_t num) {
  if constexpr (has(kForm)) {
    each_vector(0, num, [=](size_t i, auto lanes) __attribute__((always_inline)) {
      store_lanes<kFloat>(out, i, lanes, root_of<kForm>(load_lanes<kFloat>(in, i, lanes)));
    });
  } else {
    scalar_roots<kForm>(num, in, out);
  }
}

void sqrt_array(SqrtForm form, const float* in, float* out, size_t num) {
  switch (form) {
    case SqrtForm::mkl_sse:
      return sqrt_array_by<SqrtForm::mkl_sse>(in, out, num);
    case SqrtForm::mkl_avx2:
      return sqrt_array_by<SqrtForm::mkl_avx2>(in, out, num);
    case SqrtForm::mkl_avx512:
      return sqrt_array_by<SqrtForm::mkl_avx512>(in, out, num);
    default:
      return sqrt_array_by<SqrtForm::ieee>(in, out, num);
  }
}

}  // namespace
}  // namespace lightning_ssd::optim
