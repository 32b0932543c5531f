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
    lower = low.view(torch.int16).to(torch.int32) & _LOWER
    upper = high.view(torch.int16).to(torch.int32)
    is_up = (lower + went_up > _TIE) & _is_number(upper << 16)
    return (((upper - is_up.to(torch.int32)) << 16) | lower).view(torch.float32)


def without_sign(values: Tensor) -> Tensor:
    """float32 values with a sign of plus, NaNs too."""
    return (_words(values) & _MAGNITUDE).view(torch.float32)


def sign_of(values: Tensor) -> Tensor:
    """Zeros with the signs of float32 values."""
    return (_words(values) & _SIGN).view(torch.float32)


def with_sign(values: Tensor, signs: Tensor) -> Tensor:
    """Non-negative float32 values with the signs of others."""
    return (_words(values) | (_words(signs) & _SIGN)).view(torch.float32)


def _words(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def _is_number(words: Tensor) -> Tensor:
    return (words & _MAGNITUDE) <= _INFINITY
