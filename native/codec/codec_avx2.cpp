// AVX2, by the compiler's own vectors.
#include "codec/body.hpp"

namespace lightning_ssd::codec {

const Codecs kAvx2Codecs = {
    "avx2",      split_decode, split_encode,       nudged_decode,     nudged_encode, stochastic_bfloat16,
    log8_decode, log8_encode,  signed_log8_decode, signed_log8_encode};

}  // namespace lightning_ssd::codec
