// The optimizer kernels of lightning_ssd._native, on raw addresses. The caller has checked dtypes, sizes and liveness.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <stdexcept>
#include <utility>

#include "codec/adam.hpp"
#include "optim/crc32c.hpp"
#include "optim/optim.hpp"
#include "optim/thread_pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;
namespace codec = lightning_ssd::codec;
namespace optim = lightning_ssd::optim;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void adam(uintptr_t param, uintptr_t grad, optim::Dtype grad_dtype, uintptr_t exp_avg, uintptr_t exp_avg_sq,
          uintptr_t out, optim::Dtype out_dtype, size_t numel, double grad_scale, bool maximize, double decay,
          double penalty, double beta1, double beta2, double step_size, double bias2_sqrt, double eps,
          optim::SqrtForm sqrt_form, uintptr_t external_sqrt, uintptr_t set_external_threads, codec::MomentForm form,
          uintptr_t high, uintptr_t low, uintptr_t exp_avg_scale, uintptr_t exp_avg_sq_scale, uint64_t key,
          uint64_t first) {
  // Differences are computed in double and rounded once, as in Python and torch.
  const optim::AdamUpdate update{
      .param = pointer<float>(param),
      .grad = pointer<const void>(grad),
      .grad_dtype = grad_dtype,
      .exp_avg = pointer<float>(exp_avg),
      .exp_avg_sq = pointer<float>(exp_avg_sq),
      .out = pointer<void>(out),
      .out_dtype = out_dtype,
      .numel = numel,
      .grad_scale = static_cast<float>(grad_scale),
      .maximize = maximize,
      .decay = static_cast<float>(decay),
      .has_penalty = penalty != 0,
      .penalty = static_cast<float>(penalty),
      .weight1 = static_cast<float>(1 - beta1),
      .beta2 = static_cast<float>(beta2),
      .weight2 = static_cast<float>(1 - beta2),
      .step_size_negative = static_cast<float>(-step_size),
      .bias2_sqrt = static_cast<float>(bias2_sqrt),
      .eps = static_cast<float>(eps),
      .sqrt_form = sqrt_form,
      .external_sqrt = reinterpret_cast<optim::ExternalSqrt>(external_sqrt),
      .set_external_threads = reinterpret_cast<optim::SetExternalThreads>(set_external_threads),
  };
  if (high == 0 && form == codec::MomentForm::float32) {
    optim::adam(update);
    return;
  }
  codec::adam(update, {
                          .high = pointer<uint16_t>(high),
                          .low = pointer<uint16_t>(low),
                          .exp_avg = {pointer<void>(exp_avg), pointer<uint32_t>(exp_avg_scale)},
                          .exp_avg_sq = {pointer<void>(exp_avg_sq), pointer<uint32_t>(exp_avg_sq_scale)},
                          .form = form,
                          .counter = {key, first},
                      });
}

void sgd(uintptr_t param, uintptr_t grad, optim::Dtype grad_dtype, uintptr_t momentum, uintptr_t out,
         optim::Dtype out_dtype, size_t numel, double grad_scale, bool maximize, double penalty, double momentum_factor,
         double dampening, bool nesterov, bool first_step, double lr) {
  optim::sgd({
      .param = pointer<float>(param),
      .grad = pointer<const void>(grad),
      .grad_dtype = grad_dtype,
      .momentum = pointer<float>(momentum),
      .out = pointer<void>(out),
      .out_dtype = out_dtype,
      .numel = numel,
      .grad_scale = static_cast<float>(grad_scale),
      .maximize = maximize,
      .has_penalty = penalty != 0,
      .penalty = static_cast<float>(penalty),
      .momentum_factor = static_cast<float>(momentum_factor),
      .grad_weight = static_cast<float>(1 - dampening),
      .nesterov = nesterov,
      .first_step = first_step,
      .lr_negative = static_cast<float>(-lr),
  });
}

double sum_of_squares(uintptr_t data, optim::Dtype dtype, size_t numel) {
  return optim::sum_of_squares(pointer<const void>(data), dtype, numel);
}

void convert(uintptr_t dst, optim::Dtype dst_dtype, uintptr_t src, optim::Dtype src_dtype, size_t numel) {
  optim::convert(pointer<void>(dst), dst_dtype, pointer<const void>(src), src_dtype, numel);
}

uint32_t crc32c(uintptr_t data, size_t nbytes, uint32_t initial) {
  return optim::crc32c(pointer<const void>(data), nbytes, initial);
}

std::vector<uint32_t> crc32c_each(uintptr_t data, size_t nbytes, size_t piece_nbytes) {
  return optim::crc32c_each(pointer<const void>(data), nbytes, piece_nbytes);
}

uint32_t crc32c_by(const std::string& name, uintptr_t data, size_t nbytes, uint32_t initial) {
  for (const optim::Crc32cVariant& variant : optim::crc32c_variants()) {
    if (variant.name == name) {
      return ~variant.crc(~initial, pointer<const unsigned char>(data), nbytes);
    }
  }
  throw std::invalid_argument("this CPU has no CRC32C '" + name + "'");
}

std::vector<std::string> crc32c_names() {
  std::vector<std::string> names;
  for (const optim::Crc32cVariant& variant : optim::crc32c_variants()) {
    names.push_back(variant.name);
  }
  return names;
}

optim::SqrtForm matching_sqrt(uintptr_t function) {
  return optim::matching_sqrt(reinterpret_cast<optim::ExternalSqrt>(function));
}

void set_level(const std::string& name) {
  if (!optim::set_level(name)) {
    throw std::invalid_argument("this CPU has no kernels of level '" + name + "'");
  }
}

}  // namespace

void bind_optim(nb::module_& m) {
  using Released = nb::call_guard<nb::gil_scoped_release>;
  nb::enum_<optim::Dtype>(m, "Dtype", "Element type of an array.")
      .value("float32", optim::Dtype::float32)
      .value("bfloat16", optim::Dtype::bfloat16)
      .value("float16", optim::Dtype::float16);
  nb::enum_<optim::SqrtForm>(m, "SqrtForm", "How Adam takes square roots; see docs/design/numerics.md.")
      .value("ieee", optim::SqrtForm::ieee)
      .value("mkl_sse", optim::SqrtForm::mkl_sse)
      .value("mkl_avx2", optim::SqrtForm::mkl_avx2)
      .value("mkl_avx512", optim::SqrtForm::mkl_avx512)
      .value("external", optim::SqrtForm::external);
  nb::enum_<codec::MomentForm>(m, "MomentForm", "How Adam's moments are kept; see native/codec/codec.hpp.")
      .value("float32", codec::MomentForm::float32)
      .value("bfloat16", codec::MomentForm::bfloat16)
      .value("log8", codec::MomentForm::log8);
  m.def("adam", adam, Released(), "param"_a, "grad"_a, "grad_dtype"_a, "exp_avg"_a, "exp_avg_sq"_a, "out"_a,
        "out_dtype"_a, "numel"_a, nb::kw_only(), "grad_scale"_a, "maximize"_a, "decay"_a, "penalty"_a, "beta1"_a,
        "beta2"_a, "step_size"_a, "bias2_sqrt"_a, "eps"_a, "sqrt_form"_a, "external_sqrt"_a, "set_external_threads"_a,
        "form"_a = codec::MomentForm::float32, "high"_a = 0, "low"_a = 0, "exp_avg_scale"_a = 0,
        "exp_avg_sq_scale"_a = 0, "key"_a = 0, "first"_a = 0);
  m.def("sgd", sgd, Released(), "param"_a, "grad"_a, "grad_dtype"_a, "momentum"_a, "out"_a, "out_dtype"_a, "numel"_a,
        nb::kw_only(), "grad_scale"_a, "maximize"_a, "penalty"_a, "momentum_factor"_a, "dampening"_a, "nesterov"_a,
        "first_step"_a, "lr"_a);
  m.def("sum_of_squares", sum_of_squares, Released(), "data"_a, "dtype"_a, "numel"_a);
  m.def("convert", convert, Released(), "dst"_a, "dst_dtype"_a, "src"_a, "src_dtype"_a, "numel"_a);
  m.def("crc32c", crc32c, Released(), "data"_a, "nbytes"_a, "initial"_a = 0);
  m.def("crc32c_each", crc32c_each, Released(), "data"_a, "nbytes"_a, "piece_nbytes"_a);
  m.def("crc32c_by", crc32c_by, Released(), "name"_a, "data"_a, "nbytes"_a, "initial"_a = 0);
  m.def("crc32c_names", crc32c_names, "Implementations of CRC32C on this CPU, slowest first; crc32c takes the last.");
  m.def("matching_sqrt", matching_sqrt, Released(), "function"_a);
  m.def("num_kernel_threads", optim::num_threads);
  m.def("set_num_kernel_threads", optim::set_num_threads, Released(), "num"_a);
  m.def("kernel_levels", optim::levels, "Kernel levels of this CPU, slowest first.");
  m.def("kernel_level", optim::level, "The active kernel level.");
  m.def("set_kernel_level", set_level, "name"_a);
}
