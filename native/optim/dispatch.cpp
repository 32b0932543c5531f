// Chooses kernels by what this CPU can do, and cuts each call into blocks for the worker threads.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>

#include "optim/crc32c.hpp"
#include "optim/optim.hpp"
#include "optim/thread_pool.hpp"

namespace lightning_ssd::optim {
namespace {

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable = {&kScalarKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every CPU with AVX2 and FMA has F16C, which older compilers cannot ask for.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    usable.push_back(&kAvx2Kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      usable.push_back(&kAvx512Kernels);
    }
  }
#elif defined(__aarch64__)
  usable.push_back(&kNeonKernels);
#endif
  return usable;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{usable_kernels().back()};
  return kernels;
}

const Kernels& kernels() { return active_kernels(); }

template <class Body>
void each_range(size_t numel, const Body& body) {
  const size_t num_blocks = (numel + kBlockNumel - 1) / kBlockNumel;
  parallel_for(num_blocks,
               [&](size_t begin, size_t end) { body(begin * kBlockNumel, std::min(end * kBlockNumel, numel)); });
}

// Neighbours first, so that the order of additions is the same however many lanes a vector has.
double fold(std::array<double, kNumLanes>& lanes) {
  for (size_t num = kNumLanes; num > 1; num /= 2) {
    for (size_t i = 0; i < num / 2; ++i) {
      lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
    }
  }
  return lanes[0];
}

// Every mantissa at both parities of the exponent (a root repeats with every fourth power), some of every other
// exponent, and the special numbers. NaNs count as equal whatever their bits.
bool gives_bits_of(SqrtForm form, ExternalSqrt function) {
  constexpr size_t num = 4096;
  std::vector<float> in(num), ours(num), theirs(num);
  const auto same = [&](uint32_t first, uint32_t stride) {
    for (size_t i = 0; i < num; ++i) {
      const uint32_t bits = first + static_cast<uint32_t>(i) * stride;
      std::memcpy(&in[i], &bits, sizeof(bits));
    }
    function(static_cast<int64_t>(num), in.data(), theirs.data(), kExternalSqrtMode);
    kernels().sqrt(form, in.data(), ours.data(), num);
    for (size_t i = 0; i < num; ++i) {
      const bool both_nan = std::isnan(ours[i]) && std::isnan(theirs[i]);
      if (!both_nan && std::memcmp(&ours[i], &theirs[i], sizeof(float)) != 0) {
        return false;
      }
    }
    return true;
  };
  for (uint32_t exponent = 0; exponent < 512; ++exponent) {
    if (!same(exponent << 23, 1) || !same(exponent << 23, 2047) || !same(((exponent + 1) << 23) - num, 1)) {
      return false;
    }
  }
  for (uint32_t bits = 0x3f800000; bits < 0x40800000; bits += num) {
    if (!same(bits, 1)) {
      return false;
    }
  }
  return true;
}

}  // namespace

const Kernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

void adam(const AdamUpdate& update) {
  each_range(update.numel, [&](size_t begin, size_t end) { kernels().adam(update, begin, end); });
}

void sgd(const SgdUpdate& update) {
  each_range(update.numel, [&](size_t begin, size_t end) { kernels().sgd(update, begin, end); });
}

double sum_of_squares(const void* data, Dtype dtype, size_t numel) {
  const size_t num_blocks = (numel + kBlockNumel - 1) / kBlockNumel;
  std::vector<double> sums(num_blocks);
  parallel_for(num_blocks, [&](size_t begin, size_t end) {
    for (size_t block = begin; block < end; ++block) {
      std::array<double, kNumLanes> lanes{};
      const size_t first = block * kBlockNumel;
      kernels().add_squares(data, dtype, first, std::min(first + kBlockNumel, numel), lanes.data());
      sums[block] = fold(lanes);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

void convert(void* dst, Dtype dst_dtype, const void* src, Dtype src_dtype, size_t numel) {
  each_range(numel, [&](size_t begin, size_t end) {
    if (dst_dtype == src_dtype) {
      const size_t nbytes = dtype_nbytes(dst_dtype);
      std::memmove(static_cast<char*>(dst) + begin * nbytes, static_cast<const char*>(src) + begin * nbytes,
                   (end - begin) * nbytes);
    } else {
      kernels().convert(dst, dst_dtype, src, src_dtype, begin, end);
    }
  });
}

std::vector<uint32_t> crc32c_each(const void* data, size_t nbytes, size_t piece_nbytes) {
  std::vector<uint32_t> crcs((nbytes + piece_nbytes - 1) / piece_nbytes);
  parallel_for(crcs.size(), [&](size_t begin, size_t end) {
    for (size_t piece = begin; piece < end; ++piece) {
      const size_t first = piece * piece_nbytes;
      crcs[piece] = crc32c(static_cast<const char*>(data) + first, std::min(piece_nbytes, nbytes - first));
    }
  });
  return crcs;
}

SqrtForm matching_sqrt(ExternalSqrt function) {
  if (function == nullptr) {
    return SqrtForm::ieee;
  }
  for (const SqrtForm form : {SqrtForm::ieee, SqrtForm::mkl_sse, SqrtForm::mkl_avx2, SqrtForm::mkl_avx512}) {
    if (gives_bits_of(form, function)) {
      return form;
    }
  }
  return SqrtForm::external;
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable_kernels()) {
    names.emplace_back(kernels->name);
  }
  return names;
}

std::string level() { return kernels().name; }

bool set_level(const std::string& name) {
  for (const Kernels* kernels : usable_kernels()) {
    if (kernels->name == name) {
      active().store(kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace lightning_ssd::optim
