// Adam on state that is kept in one of the forms of codec.hpp: decoded, updated and encoded in one pass through memory.
#pragma once

#include "codec/codec.hpp"
#include "optim/kernels.hpp"

namespace lightning_ssd::codec {

enum class MomentForm : int { float32 = 0, bfloat16 = 1, log8 = 2 };

struct Moment {
  void* data;       // float, uint16_t or uint8_t
  uint32_t* scale;  // log8: one float for every kBlockNumel elements; else null
};

struct StoredAdam {
  uint16_t* high;  // null: the master is a float32 array, AdamUpdate's param
  uint16_t* low;
  Moment exp_avg;
  Moment exp_avg_sq;
  MomentForm form;  // of both moments; [Note: split] with float32, else [Note: nudged split], also of whole masters
  Counter counter;  // of the first element
};

// `update` says what happens; of its arrays only `grad` (and `param`, `out` without a split) are used. Arrays begin
// where a block of a parameter begins.
void adam(const optim::AdamUpdate& update, const StoredAdam& stored);

}  // namespace lightning_ssd::codec
