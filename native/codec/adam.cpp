// Pieces of state that fit into the first-level cache go through Adam's kernel for float32.
#include "codec/adam.hpp"

#include <algorithm>

#include "optim/optim.hpp"
#include "optim/thread_pool.hpp"

namespace lightning_ssd::codec {
namespace {

constexpr size_t kPieceNumel = 1024;
static_assert(kPieceNumel % kBlockNumel == 0 && optim::kBlockNumel % kPieceNumel == 0);

struct Piece {  // as float32
  alignas(64) uint32_t master[kPieceNumel];
  alignas(64) uint32_t exp_avg[kPieceNumel];
  alignas(64) uint32_t exp_avg_sq[kPieceNumel];
  alignas(64) uint16_t high[kPieceNumel];
  alignas(64) uint16_t low[kPieceNumel];
};

template <class T>
T* at(void* data, size_t first) {
  return static_cast<T*>(data) + first;
}

float* floats(uint32_t* words) { return reinterpret_cast<float*>(words); }

void decode_moments(const optim::Kernels& kernels, const StoredAdam& s, size_t first, size_t num, Piece& piece) {
  const Codecs& codecs = *kernels.codecs;
  if (s.form == MomentForm::bfloat16) {
    const auto widen = [&](const Moment& moment, uint32_t* words) {
      kernels.convert(words, optim::Dtype::float32, at<uint16_t>(moment.data, first), optim::Dtype::bfloat16, 0, num);
    };
    widen(s.exp_avg, piece.exp_avg);
    widen(s.exp_avg_sq, piece.exp_avg_sq);
  } else {
    const size_t block = first / kBlockNumel;
    codecs.signed_log8_decode(at<uint8_t>(s.exp_avg.data, first), s.exp_avg.scale + block, piece.exp_avg, num);
    codecs.log8_decode(at<uint8_t>(s.exp_avg_sq.data, first), s.exp_avg_sq.scale + block, piece.exp_avg_sq, num);
  }
}

void encode_moments(const optim::Kernels& kernels, const StoredAdam& s, size_t first, size_t num, const Piece& piece) {
  const Codecs& codecs = *kernels.codecs;
  const Counter counter{s.counter.key, s.counter.first + first};
  if (s.form == MomentForm::bfloat16) {
    kernels.convert(at<uint16_t>(s.exp_avg.data, first), optim::Dtype::bfloat16, piece.exp_avg, optim::Dtype::float32,
                    0, num);
    codecs.stochastic_bfloat16(piece.exp_avg_sq, at<uint16_t>(s.exp_avg_sq.data, first), num, counter);
  } else {
    const size_t block = first / kBlockNumel;
    codecs.signed_log8_encode(piece.exp_avg, at<uint8_t>(s.exp_avg.data, first), s.exp_avg.scale + block, num);
    codecs.log8_encode(piece.exp_avg_sq, at<uint8_t>(s.exp_avg_sq.data, first), s.exp_avg_sq.scale + block, num,
                       counter);
  }
}

void update_piece(const optim::Kernels& kernels, const optim::AdamUpdate& u, const StoredAdam& s, size_t first,
                  size_t num, Piece& piece) {
  const Codecs& codecs = *kernels.codecs;
  optim::AdamUpdate part = u;
  part.grad = static_cast<const char*>(u.grad) + first * optim::dtype_nbytes(u.grad_dtype);
  part.numel = num;
  part.exp_avg = floats(piece.exp_avg);
  part.exp_avg_sq = floats(piece.exp_avg_sq);
  const bool is_exact = s.form == MomentForm::float32;
  if (is_exact) {
    part.exp_avg = at<float>(s.exp_avg.data, first);
  } else {
    decode_moments(kernels, s, first, num, piece);
  }
  if (s.high == nullptr) {
    part.param = u.param + first;
    part.out = u.out == nullptr ? nullptr : static_cast<char*>(u.out) + first * optim::dtype_nbytes(u.out_dtype);
  } else {
    part.param = floats(piece.master);
    part.out = nullptr;
    if (is_exact) {
      codecs.split_decode(s.high + first, s.low + first, at<uint32_t>(s.exp_avg_sq.data, first), piece.master,
                          piece.exp_avg_sq, num);
    } else {
      codecs.nudged_decode(s.high + first, s.low + first, piece.master, num);
    }
  }
  kernels.adam(part, 0, num);
  if (!is_exact) {
    encode_moments(kernels, s, first, num, piece);
  }
  if (s.high != nullptr && is_exact) {
    codecs.split_encode(piece.master, piece.exp_avg_sq, s.high + first, s.low + first,
                        at<uint32_t>(s.exp_avg_sq.data, first), num);
  } else if (s.high != nullptr) {
    codecs.nudged_encode(piece.master, s.high + first, s.low + first, num);
  } else if (!is_exact && u.out != nullptr && u.out_dtype == optim::Dtype::bfloat16) {
    uint32_t* master = reinterpret_cast<uint32_t*>(u.param) + first;  // the bits that two halves would keep
    codecs.nudged_encode(master, piece.high, piece.low, num);
    codecs.nudged_decode(piece.high, piece.low, master, num);
  }
}

}  // namespace

void adam(const optim::AdamUpdate& update, const StoredAdam& stored) {
  const optim::Kernels& kernels = optim::active_kernels();
  const size_t num_blocks = (update.numel + optim::kBlockNumel - 1) / optim::kBlockNumel;
  optim::parallel_for(num_blocks, [&](size_t begin, size_t end) {
    Piece piece;
    const size_t last = std::min(end * optim::kBlockNumel, update.numel);
    for (size_t first = begin * optim::kBlockNumel; first < last; first += kPieceNumel) {
      update_piece(kernels, update, stored, first, std::min(kPieceNumel, last - first), piece);
    }
  });
}

}  // namespace lightning_ssd::codec
