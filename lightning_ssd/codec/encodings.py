"""How kinds of state that are not stored as they are computed become numbers again: the one home of decoding.

A kind that is stored as it is computed (``param``, ``master``, ``exp_avg``, ...) has a file of that name. An encoded
one has a file of another name, so that no reader takes its bytes for values. All of them decode to float32.

    master.low         uint16: the lower half of the master; the upper half is ``param``
    exp_avg_sq.tie     float32: the second moment of Adam, whose sign is a part of the master
    master.nudged      uint16: the lower half of the master, where a tie is never rounded down
    exp_avg.bf16       bfloat16: the first moment of Adam, rounded
    exp_avg_sq.bf16    bfloat16: the second moment of Adam, rounded
    exp_avg.log8       uint8: a sign, and steps below the largest first moment of a block of 128 elements
    exp_avg.scale      float32: the largest first moment of each block
    exp_avg_sq.log8    uint8: steps below the largest second moment of a block
    exp_avg_sq.scale   float32: the largest second moment of each block

See [Note: split], [Note: nudged split] and [Note: logarithmic codes] in ``native/codec/codec.hpp``.
docs/checkpoints.md says how other programs read them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from lightning_ssd.kernels import bits

LOW = "master.low"
TIE = "exp_avg_sq.tie"
NUDGED = "master.nudged"
HALVES = (LOW, NUDGED)
"""Kinds of files that are one half of masters, of which ``param`` is the other."""
FIRST_BF16 = "exp_avg.bf16"
SECOND_BF16 = "exp_avg_sq.bf16"

FIRST_LOG8, FIRST_SCALE = "exp_avg.log8", "exp_avg.scale"
SECOND_LOG8, SECOND_SCALE = "exp_avg_sq.log8", "exp_avg_sq.scale"
BY_BLOCK = frozenset({FIRST_SCALE, SECOND_SCALE})
"""Kinds of files with one number for each block of a parameter; what has the blocks decodes them."""

STORED_DTYPE: Mapping[str, str] = {
    **{LOW: "U16", TIE: "F32", NUDGED: "U16", FIRST_BF16: "BF16", SECOND_BF16: "BF16"},
    **{FIRST_LOG8: "U8", FIRST_SCALE: "F32", SECOND_LOG8: "U8", SECOND_SCALE: "F32"},
}
"""Safetensors dtype of each kind of encoded file."""


DECODED_DTYPE = "F32"
"""Safetensors dtype of what is decoded."""


class Encoding(ABC):
    """How one kind is decoded.

    Attributes:
        kind: What is decoded.
        parts: The kinds of files that have it; the first one says that it is there.
        needed: Those that must be there.
    """

    kind: str
    parts: tuple[str, ...]
    needed: tuple[str, ...]

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The float32 values of one parameter, flat, in memory of their own.

        Args:
            parts: What there is of `parts`, flat.
        """


class _SplitMaster(Encoding):
    kind, parts, needed = "master", (LOW, "param", TIE), (LOW, "param")

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return bits.split_decode(parts["param"], parts[LOW], parts.get(TIE))


class _TiedMoment(Encoding):
    kind, parts, needed = "exp_avg_sq", (TIE,), (TIE,)

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return bits.without_sign(parts[TIE])


class _NudgedMaster(Encoding):
    kind, parts, needed = "master", (NUDGED, "param"), (NUDGED, "param")

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return bits.nudged_decode(parts["param"], parts[NUDGED])


class _NarrowMoment(Encoding):
    def __init__(self, kind: str, file: str) -> None:
        self.kind = kind
        self.parts = self.needed = (file,)

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts[self.parts[0]].float()


class _SignedLog8(Encoding):
    kind, parts, needed = "exp_avg", (FIRST_LOG8, FIRST_SCALE), (FIRST_LOG8, FIRST_SCALE)

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return bits.signed_log8_decode(parts[FIRST_LOG8], parts[FIRST_SCALE])


class _Log8(Encoding):
    kind, parts, needed = "exp_avg_sq", (SECOND_LOG8, SECOND_SCALE), (SECOND_LOG8, SECOND_SCALE)

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return bits.log8_decode(parts[SECOND_LOG8], parts[SECOND_SCALE])


_ENCODINGS: Mapping[str, Encoding] = {
    each.parts[0]: each
    for each in (
        _SplitMaster(),
        _TiedMoment(),
        _NudgedMaster(),
        _NarrowMoment("exp_avg", FIRST_BF16),
        _NarrowMoment("exp_avg_sq", SECOND_BF16),
        _SignedLog8(),
        _Log8(),
    )
}


def encoding_of(kind: str, stored: Iterable[str]) -> Encoding | None:
    """How ``kind`` is decoded where there are files of the kinds ``stored``; None if it is not encoded."""
    return next((e for name in stored if (e := _ENCODINGS.get(name)) is not None and e.kind == kind), None)


def decoded_kinds(stored: Iterable[str]) -> list[str]:
    """The kinds whose values are in files of the kinds ``stored``, in that order."""
    return [_ENCODINGS[name].kind if name in _ENCODINGS else name for name in stored if name not in BY_BLOCK]


def stored_shape(file: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape, in a kind of file, of what belongs to a parameter of ``shape``."""
    return (-(-math.prod(shape) // bits.BLOCK_NUMEL),) if file in BY_BLOCK else shape


def files_with(kinds: Sequence[str], stored: Iterable[str]) -> set[str]:
    """Those of ``stored`` without which the values of ``kinds`` are not known."""
    there = list(stored)
    encodings = [encoding_of(kind, there) for kind in kinds]
    return {*kinds, *(part for e in encodings if e is not None for part in e.parts)}.intersection(there)


def is_encoded(stored: Iterable[str]) -> bool:
    """Whether one of these kinds of files has to be decoded."""
    return not _ENCODINGS.keys().isdisjoint(stored)
