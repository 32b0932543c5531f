// The vector kernels, written once over a `Simd` type that each instruction set defines before it includes this file.
// No include guard: each including file gets its own copies, in an unnamed namespace. They must not share inline
// functions with other files: the linker would keep one copy, perhaps the one with instructions this CPU lacks.
// Simd: Floats, Doubles, Halves (kWidth 16-bit numbers), kWidth (floats per vector), and the operations used below.
#include "optim/prefetch.hpp"

namespace lightning_ssd::optim {
namespace {

// [Note: two vectors side by side] An update is one chain of some 25 operations, two of them divisions: about 100
// cycles, of which a CPU overlaps as many vectors as its queue of waiting instructions holds. That is too few for
// memory to be the limit of one thread; so a step takes two vectors and issues each operation for both. Measured on an
// AMD Zen with AVX-512: 0.58 ns per parameter from L2 with one, 0.52 with two, against some 0.57 that memory takes.
constexpr size_t kParts = 2;
constexpr size_t kWidth = kParts * Simd::kWidth;
constexpr size_t kPassNumel = 4096;  // between calls of an external function, whose input and result so stay in cache

struct Floats {
  Simd::Floats part[kParts];
};

struct Wide {  // the operations of Simd on Floats
  template <class Operation, class... Operands>
  [[gnu::always_inline]] static Floats each(Operation operation, const Operands&... operands) {
    Floats result;
    for (size_t k = 0; k < kParts; ++k) {
      result.part[k] = operation(operands.part[k]...);
    }
    return result;
  }
  static Floats set(float value) { return {Simd::set(value), Simd::set(value)}; }
  static Floats add(Floats a, Floats b) { return each(Simd::add, a, b); }
  static Floats sub(Floats a, Floats b) { return each(Simd::sub, a, b); }
  static Floats mul(Floats a, Floats b) { return each(Simd::mul, a, b); }
  static Floats div(Floats a, Floats b) { return each(Simd::div, a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return each(Simd::fma, a, b, c); }
  static Floats negate(Floats a) { return each(Simd::negate, a); }
  static Floats sqrt(Floats a) { return each(Simd::sqrt, a); }
};

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
[[gnu::always_inline]] inline Simd::Floats load_part(const void* from) {
  if constexpr (kDtype == Dtype::float32) {
    return Simd::load(static_cast<const float*>(from));
  } else if constexpr (kDtype == Dtype::bfloat16) {
    return Simd::load_bfloat16(static_cast<const uint16_t*>(from));
  } else {
    return Simd::load_float16(static_cast<const uint16_t*>(from));
  }
}

// Streamed: past the caches, which saves reading the line that is overwritten. Only for what is not read again soon,
// and where the address allows it; fence_streams() orders it before what the thread writes next.
enum class Store { cached, streamed };

template <Dtype kDtype, Store kStore>
[[gnu::always_inline]] inline void store_part(void* to, Simd::Floats value) {
  if constexpr (kDtype == Dtype::float32) {
    Simd::store(static_cast<float*>(to), value);
  } else {
    const Simd::Halves halves = kDtype == Dtype::bfloat16 ? Simd::bfloat16_of(value) : Simd::float16_of(value);
    if (kStore == Store::streamed && reinterpret_cast<__UINTPTR_TYPE__>(to) % sizeof(halves) == 0) {
      Simd::stream_halves(static_cast<uint16_t*>(to), halves);
    } else {
      Simd::store_halves(static_cast<uint16_t*>(to), halves);
    }
  }
}

template <Dtype kDtype>
[[gnu::always_inline]] inline Floats load_full(const char* from) {
  Floats result;
  for (size_t k = 0; k < kParts; ++k) {
    result.part[k] = load_part<kDtype>(from + k * Simd::kWidth * dtype_nbytes(kDtype));
  }
  return result;
}

template <Dtype kDtype, Store kStore = Store::cached>
[[gnu::always_inline]] inline void store_full(char* to, Floats value) {
  for (size_t k = 0; k < kParts; ++k) {
    store_part<kDtype, kStore>(to + k * Simd::kWidth * dtype_nbytes(kDtype), value.part[k]);
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

template <Dtype kDtype, Store kStore = Store::cached, class Lanes>
[[gnu::always_inline]] inline void store_lanes(void* data, size_t i, Lanes lanes, Floats value) {
  constexpr size_t nbytes = dtype_nbytes(kDtype);
  char* to = static_cast<char*>(data) + i * nbytes;
  if constexpr (__is_same(Lanes, Full)) {
    store_full<kDtype, kStore>(to, value);
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

// See [Note: MKL's square roots] in scalar.cpp. Templates over the instruction set, so that one without them defines no
// parts.
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

// Where the instruction set has not what the form is made of.
template <SqrtForm kForm>
void scalar_roots(size_t num, const float* in, float* out) {
  kScalarKernels.sqrt(kForm, in, out, num);
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
  // Threads of its own would spend their time waiting for each other: a pass is some microseconds of work.
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

struct SquareSums {                                  // kNumLanes of them
  static constexpr size_t kHalf = Simd::kWidth / 2;  // doubles per vector
  Simd::Doubles sums[kNumLanes / kHalf];

  explicit SquareSums(const double* lanes) {
    for (size_t k = 0; k < kNumLanes / kHalf; ++k) {
      sums[k] = Simd::load_doubles(lanes + k * kHalf);
    }
  }
  [[gnu::always_inline]] void add(size_t k, Simd::Doubles value) { sums[k] = Simd::add_square(sums[k], value); }
  [[gnu::always_inline]] void add(size_t k, const Floats& value) {
    for (const Simd::Floats& part : value.part) {
      add(k++, Simd::low_doubles(part));
      add(k++, Simd::high_doubles(part));
    }
  }
  void store(double* lanes) const {
    for (size_t k = 0; k < kNumLanes / kHalf; ++k) {
      Simd::store_doubles(lanes + k * kHalf, sums[k]);
    }
  }
};

// Groups of kNumLanes bfloat16, as many as there are; returns where they end. Even and odd elements go to vectors of
// their own: widening in order takes shuffles, which would be the limit here.
size_t add_squares_of_pairs(const uint16_t* data, size_t begin, size_t end, double lanes[kNumLanes]) {
  const auto place = [](size_t lane) {
    const size_t in_vector = lane % Simd::kWidth;
    return lane - in_vector + in_vector % 2 * SquareSums::kHalf + in_vector / 2;
  };
  alignas(64) double placed[kNumLanes];
  for (size_t lane = 0; lane < kNumLanes; ++lane) {
    placed[place(lane)] = lanes[lane];
  }
  SquareSums sums(placed);
  size_t i = begin;
  for (; i + kNumLanes <= end; i += kNumLanes) {
    prefetch<kNumLanes * sizeof(uint16_t)>(data + i);
    for (size_t k = 0; k < kNumLanes / Simd::kWidth; ++k) {
      const auto words = Simd::load_words(data + i + k * Simd::kWidth);
      sums.add(2 * k, Simd::low_bfloat16s(words));
      sums.add(2 * k + 1, Simd::high_bfloat16s(words));
    }
  }
  sums.store(placed);
  for (size_t lane = 0; lane < kNumLanes; ++lane) {
    lanes[lane] = placed[place(lane)];
  }
  return i;
}

template <Dtype kDtype>
void add_squares_of(const void* data, size_t begin, size_t end, double lanes[kNumLanes]) {
  static_assert(kNumLanes % kWidth == 0);
  size_t i = begin;
  if constexpr (kDtype == Dtype::bfloat16) {
    i = add_squares_of_pairs(static_cast<const uint16_t*>(data), begin, end, lanes);
  }
  SquareSums sums(lanes);
  constexpr size_t step = kWidth / SquareSums::kHalf;
  for (; i + kNumLanes <= end; i += kNumLanes) {
    for (size_t k = 0; k < kNumLanes / SquareSums::kHalf; k += step) {
      sums.add(k, load_lanes<kDtype>(data, i + k * SquareSums::kHalf, Full{}));
    }
  }
  for (size_t k = 0; k < kNumLanes / SquareSums::kHalf; k += step) {  // a fixed number, so sums stay in registers
    if (i < end) {
      const size_t num = end - i < kWidth ? end - i : kWidth;  // lanes past it add +0
      sums.add(k, load_lanes<kDtype>(data, i, num));
      i += kWidth;
    }
  }
  sums.store(lanes);
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
