// Vectors of `kWidth` floats, loaded from and stored to arrays of any dtype. Part of simd_body.hpp; see there.
#include "optim/prefetch.hpp"

namespace lightning_ssd::optim {
namespace {

// [Note: two vectors side by side] An update is one chain of some 25 operations, two of them divisions: about 100
// cycles, of which a CPU overlaps as many vectors as its queue of waiting instructions holds. That is too few for
// memory to be the limit of one thread; so a step takes two vectors and issues each operation for both. Measured on an
// AMD Zen with AVX-512: 0.58 ns per parameter from L2 with one, 0.52 with two, against some 0.57 that memory takes.
constexpr size_t kParts = 2;
constexpr size_t kWidth = kParts * Simd::kWidth;

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

// Streamed stores bypass the caches, which saves reading the line that is overwritten. Only for values that are not
// read again soon, and for aligned addresses; fence_streams() orders them before the thread's next stores.
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

// A partial vector goes through a buffer, so that its lanes are rounded by the same instructions as whole vectors.
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

}  // namespace
}  // namespace lightning_ssd::optim
