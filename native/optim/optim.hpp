// What the bindings call: each runs the active kernels over the worker threads. Results depend on neither.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "optim/kernels.hpp"

namespace lightning_ssd::optim {

void adam(const AdamUpdate& update);
void sgd(const SgdUpdate& update);
double sum_of_squares(const void* data, Dtype dtype, size_t numel);  // finite if and only if every element is
void convert(void* dst, Dtype dst_dtype, const void* src, Dtype src_dtype, size_t numel);

// CRC of each piece of piece_nbytes bytes, of which the last may be shorter.
std::vector<uint32_t> crc32c_each(const void* data, size_t nbytes, size_t piece_nbytes);

// Which form gives the bits of this function for every float; SqrtForm::external if none of ours does.
SqrtForm matching_sqrt(ExternalSqrt function);

const Kernels& active_kernels();
std::vector<std::string> levels();        // of this CPU, slowest first
std::string level();                      // the active one; at first the fastest
bool set_level(const std::string& name);  // false if this CPU has no such level

}  // namespace lightning_ssd::optim
