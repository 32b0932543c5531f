// Sums of squares and conversions. Part of simd_body.hpp; see there.
namespace lightning_ssd::optim {
namespace {

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

// Adds all whole groups of kNumLanes bfloat16 and returns where they end. Even and odd elements go to separate vectors:
// widening them in order takes shuffles, which would limit the speed.
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

}  // namespace
}  // namespace lightning_ssd::optim
