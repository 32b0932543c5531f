"""The forms of state as bits, by torch's integer operations: the slow version of ``native/codec``, for single tensors.

What the forms are, and why, is in ``native/codec/codec.hpp``. Tensors are flat; float32 values are read as int32 words.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
_SIGN = -0x80000000
_LOWER = 0xFFFF
_TIE = 0x8000
_WORD = 0xFFFFFFFF
_STEP_BITS = 20
_STEP = 1 << _STEP_BITS
_ZERO_CODE = 127

BLOCK_NUMEL = 128
"""Elements under one largest value. A parameter begins with a block; its last one may be shorter."""


def split_encode(master: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A float32 master as two halves and one borrowed bit; [Note: split] in ``native/codec/codec.hpp``.

    Args:
        master: float32.
        exp_avg_sq: float32 second moments of the same elements; their signs are not looked at.

    Returns:
        The upper half, which is the master rounded to bfloat16; the lower half, uint16; and the second moments, whose
        sign is set where the master was a tie that was rounded up.
    """
    words = _words(master)
    lower = words & _LOWER
    went_up = (lower == _TIE) & ((words >> 16) & 1).bool() & _is_number(words)
    tied = (_words(exp_avg_sq) & _MAGNITUDE) | (went_up.to(torch.int32) * _SIGN)
    return master.to(torch.bfloat16), lower.to(torch.int16).view(torch.uint16), tied.view(torch.float32)


def split_decode(high: Tensor, low: Tensor, tied: Tensor | None) -> Tensor:
    """The master that `split_encode` was given; ``tied`` is None if no sign is set."""
    went_up = torch.zeros(1, dtype=torch.int32) if tied is None else (_words(tied) < 0).to(torch.int32)
    return _joined(high, low, went_up)


def nudged_encode(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 master as two halves, with a tie that stays one unit nearer to zero; [Note: nudged split]."""
    words = _words(master)
    lower = words & _LOWER
    stayed = (lower == _TIE) & ~((words >> 16) & 1).bool() & _is_number(words)
    low = (lower - stayed.to(torch.int32)).to(torch.int16).view(torch.uint16)
    return master.to(torch.bfloat16), low


def nudged_decode(high: Tensor, low: Tensor) -> Tensor:
    """The master that `nudged_encode` was given, but for ties that it nudged."""
    return _joined(high, low, torch.ones(1, dtype=torch.int32))


def positive_bfloat16(values: Tensor, counter: tuple[int, int] | None = None) -> Tensor:
    """bfloat16 of non-negative float32 values. What is not zero stays so, and what is finite too.

    Args:
        values: float32; their signs are not looked at.
        counter: Key and number of the first element: rounded up or down by chance, in proportion to the distance. None:
            rounded to nearest.
    """
    words = _words(values) & _MAGNITUDE
    if counter is None:
        add: Tensor | int = 0x7FFF + ((words >> 16) & 1)
    else:
        add = (random_bits(*counter, values.numel()) & _LOWER).to(torch.int32)
    upper = ((words.long() + add) >> 16).to(torch.int32)
    upper = torch.where(words != 0, upper.clamp_min(1), upper)
    upper = torch.where(words < _INFINITY, upper.clamp_max(0x7F7F), words >> 16)
    upper = torch.where(words > _INFINITY, 0x7FC0, upper)
    return upper.to(torch.int16).view(torch.bfloat16)


def log8_encode(values: Tensor, counter: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Non-negative float32 values as steps below the largest of their block; [Note: logarithmic codes].

    Args:
        values: float32; their signs are not looked at.
        counter: As of `positive_bfloat16`.

    Returns:
        A code for each value, uint8, and the largest value of each block of `BLOCK_NUMEL`, float32.
    """
    words = _blocks(_words(values) & _MAGNITUDE)
    most = words.amax(1, keepdim=True)
    below = (most - words).long()
    if counter is None:  # the smallest number stands for all that is too far below
        add: Tensor = torch.where(words == 1, _STEP - 1, _STEP // 2)
    else:
        add = _blocks(random_bits(*counter, values.numel()) & (_STEP - 1))
    codes = ((below + add) >> _STEP_BITS).clamp_max(255).to(torch.uint8)
    return codes.reshape(-1)[: values.numel()], most.reshape(-1).view(torch.float32)


def log8_decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The values of `log8_encode`, rounded. Of a block that is not all zero, none is zero."""
    most = _words(scale).unsqueeze(1)
    below = torch.minimum(_blocks(codes.to(torch.int32)) << _STEP_BITS, most)
    found = torch.maximum(most - below, (most != 0).to(torch.int32))
    return found.reshape(-1)[: codes.numel()].view(torch.float32)


def signed_log8_encode(values: Tensor) -> tuple[Tensor, Tensor]:
    """The same of values with a sign, which takes one bit; zero has a code of its own. Rounds to nearest."""
    words = _blocks(_words(values))
    magnitude = words & _MAGNITUDE
    most = magnitude.amax(1, keepdim=True)
    below = (most - magnitude).long()
    nearest = ((below + _STEP // 2) >> _STEP_BITS).clamp_max(_ZERO_CODE - 1)
    is_zero = (magnitude == 0) | (below > ((_ZERO_CODE - 1) << _STEP_BITS) + (1 << 23))
    codes = torch.where(is_zero, _ZERO_CODE, nearest) | ((words < 0).long() << 7)
    return codes.to(torch.uint8).reshape(-1)[: values.numel()], most.reshape(-1).view(torch.float32)


def signed_log8_decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The values of `signed_log8_encode`, rounded."""
    most, words = _words(scale).unsqueeze(1), _blocks(codes.to(torch.int32))
    steps = words & 0x7F
    magnitude = torch.where(steps == _ZERO_CODE, 0, most - torch.minimum(steps << _STEP_BITS, most))
    found = magnitude | torch.where(words >= 0x80, _SIGN, 0).to(torch.int32)
    return found.reshape(-1)[: codes.numel()].view(torch.float32)


def random_bits(key: int, first: int, num: int) -> Tensor:
    """32 random bits, as int64, of each of ``num`` elements; see ``native/codec/random_bits.hpp``."""
    index = torch.arange(first, first + num, dtype=torch.int64)
    low = _mixed((index & _WORD) ^ (key & _WORD))
    return _mixed(low ^ (key >> 32) ^ (((index >> 32) * 0x9E3779B9) & _WORD))


def without_sign(values: Tensor) -> Tensor:
    """float32 values with a sign of plus, NaNs too."""
    return (_words(values) & _MAGNITUDE).view(torch.float32)


def sign_of(values: Tensor) -> Tensor:
    """Zeros with the signs of float32 values."""
    return (_words(values) & _SIGN).view(torch.float32)


def with_sign(values: Tensor, signs: Tensor) -> Tensor:
    """Non-negative float32 values with the signs of others."""
    return (_words(values) | (_words(signs) & _SIGN)).view(torch.float32)


def _joined(high: Tensor, low: Tensor, tie_went_up: Tensor) -> Tensor:
    lower = low.view(torch.int16).to(torch.int32) & _LOWER
    upper = high.view(torch.int16).to(torch.int32)
    is_up = (lower + tie_went_up > _TIE) & _is_number(upper << 16)
    return (((upper - is_up.to(torch.int32)) << 16) | lower).view(torch.float32)


def _blocks(flat: Tensor) -> Tensor:
    """Rows of `BLOCK_NUMEL`; the last one is filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_NUMEL)).view(-1, BLOCK_NUMEL)


def _words(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def _is_number(words: Tensor) -> Tensor:
    return (words & _MAGNITUDE) <= _INFINITY


def _mixed(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0xD35A2D97) & _WORD
    return x ^ (x >> 15)
