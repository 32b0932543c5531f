// Arithmetic of the CPU update: the arguments of one call, and the table of kernels that each instruction set fills in.
// No Python, no torch. Every kernel gives the bits of the scalar one; docs/design/numerics.md says which bits and why.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/codec.hpp"

namespace lightning_ssd::optim {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

enum class SqrtForm : int {  // see [Note: MKL's square roots] in scalar.cpp
  ieee = 0,                  // correctly rounded
  mkl_sse = 1,               // x86 only, this and the next two
  mkl_avx2 = 2,
  mkl_avx512 = 3,
  external = 4,  // a function handed in
};

struct FloatBits {  // positive floats, by their bits; `last` is not one of them
  uint32_t first;
  uint32_t last;
};

// The floats for which one of MKL's forms is its plain formula; the others are special cases.
constexpr FloatBits plain_range(SqrtForm form) {
  switch (form) {
    case SqrtForm::mkl_sse:
      return {0x00800000, 0x7f7ff000};
    case SqrtForm::mkl_avx2:
      return {0x00800000, 0x7f800000};
    default:
      return {0x10000000, 0x7f800000};
  }
}

// Called as f(n, in, out, kExternalSqrtMode); the signature of MKL's vmsSqrt, whatever the width of its first argument.
using ExternalSqrt = void (*)(int64_t num, const float* in, float* out, int64_t mode);
inline constexpr int64_t kExternalSqrtMode = 0x140102;  // high accuracy, denormals kept, no error reports

// Sets how many threads an external function may start for calls from this thread, and returns how many that was; the
// signature of MKL_Set_Num_Threads_Local.
using SetExternalThreads = int (*)(int num_threads);

struct AdamUpdate {  // all arrays numel long; scalars already rounded to float, as torch does
  float* param;
  const void* grad;
  Dtype grad_dtype;
  float* exp_avg;
  float* exp_avg_sq;
  void* out;  // may be null
  Dtype out_dtype;
  size_t numel;
  float grad_scale;  // 1: none
  bool maximize;
  float decay;  // of the weights, decoupled; 1: none
  bool has_penalty;
  float penalty;  // of the L2 norm
  float weight1;  // 1 - beta1
  float beta2;
  float weight2;  // 1 - beta2
  float step_size_negative;
  float bias2_sqrt;
  float eps;
  SqrtForm sqrt_form;
  ExternalSqrt external_sqrt;               // for SqrtForm::external
  SetExternalThreads set_external_threads;  // may be null
};

struct SgdUpdate {  // all arrays numel long
  float* param;
  const void* grad;
  Dtype grad_dtype;
  float* momentum;  // may be null
  void* out;        // may be null
  Dtype out_dtype;
  size_t numel;
  float grad_scale;  // 1: none
  bool maximize;
  bool has_penalty;
  float penalty;
  float momentum_factor;
  float grad_weight;  // 1 - dampening
  bool nesterov;
  bool first_step;
  float lr_negative;
};

inline constexpr size_t kNumLanes = 32;       // independent sums of squares: element i of a block goes to lane i % 32
inline constexpr size_t kBlockNumel = 16384;  // unit of work of a thread, and of a sum

struct Kernels {  // ranges are in elements
  const char* name;
  void (*adam)(const AdamUpdate&, size_t begin, size_t end);
  void (*sgd)(const SgdUpdate&, size_t begin, size_t end);
  void (*add_squares)(const void* data, Dtype dtype, size_t begin, size_t end, double lanes[kNumLanes]);
  void (*convert)(void* dst, Dtype dst_dtype, const void* src, Dtype src_dtype, size_t begin, size_t end);
  void (*sqrt)(SqrtForm form, const float* in, float* out, size_t num);  // not for SqrtForm::external
  const codec::Codecs* codecs;
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;

inline constexpr size_t dtype_nbytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace lightning_ssd::optim
