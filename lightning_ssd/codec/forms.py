"""The forms that the state of a unit may have in its files, one class each, and what an update does with them.

A form says which kinds of files take the place of which kind of state, how values become their bytes, and which kernel
updates them. What is read from files is decoded in `codec.encodings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_ssd.codec.encodings import (
    FIRST_BF16,
    FIRST_LOG8,
    FIRST_SCALE,
    LOW,
    NUDGED,
    SECOND_BF16,
    SECOND_LOG8,
    SECOND_SCALE,
    TIE,
)
from lightning_ssd.errors import CheckpointError
from lightning_ssd.kernels import bits
from lightning_ssd.kernels.options import AdamOptions
from lightning_ssd.kernels.stored import Counter, narrow_adam_, split_adam_


class Piece(NamedTuple):
    """A piece of one parameter in an update; tensors are flat and changed in place.

    Attributes:
        param: What the update changes: the parameter, or its master where that has a file of its own.
        grad: The gradient; not changed.
        states: What the other files have, by kind.
        out: The parameter, if ``param`` is its master.
        name: Of the parameter.
        offset: Number of the first element in the parameter.
    """

    param: Tensor
    grad: Tensor
    states: Mapping[str, Tensor]
    out: Tensor | None
    name: str
    offset: int


class Form:
    """State as it is computed: one file a kind.

    Attributes:
        name: The option ``state`` that asks for it.
        is_plain: Files have what is computed, so that any rule can update them.
        has_halves: The parameter is one half of its master.
    """

    name = "fp32"
    is_plain = True
    has_halves = False
    _files: Mapping[str, tuple[str, ...]] = {}

    def files(self, kind: str) -> tuple[str, ...]:
        """The kinds of files that are written for ``kind``; others may be read for it."""
        return self._files.get(kind, (kind,))

    def layouts(self, kinds: Sequence[str]) -> list[str]:
        """The kinds of files of a unit that has ``kinds`` beside ``param``."""
        return list(dict.fromkeys(name for kind in kinds for name in self.files(kind)))

    def encode(self, kind: str, value: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is written to each of the `files` of ``kind`` for one parameter.

        Args:
            kind: Which.
            value: Its values, flat.
            stored: What the files have now, flat; a kind that has no file yet is missing.

        Raises:
            CheckpointError: The form cannot keep these values.
        """
        return {kind: value}

    def reset(self, states: Mapping[str, Tensor]) -> None:
        """Make zeros of optimizer states, in place; the master stays."""
        for state in states.values():
            state.zero_()

    def adam_(self, piece: Piece, options: AdamOptions) -> None:
        """One step of Adam, in place."""
        raise NotImplementedError(f"state={self.name!r} is updated by rules")


class Split(Form):
    """A float32 master in two halves, of which the upper one is the bfloat16 parameter. Exact; [Note: split]."""

    name = "split"
    is_plain = False
    has_halves = True
    _files: Mapping[str, tuple[str, ...]] = {"master": (LOW, TIE), "exp_avg_sq": (TIE,)}

    def encode(self, kind: str, value: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Form.encode`; ``value`` of a master rounds to the parameter."""
        value = value.float()
        tied = stored.get(TIE)
        if kind == "master":
            _, low, tied = bits.split_encode(value, torch.zeros_like(value) if tied is None else tied)
            return {LOW: low, TIE: tied}
        if kind != "exp_avg_sq":
            return {kind: value}
        _require_positive(value, self.name)
        plain = bits.without_sign(value)
        return {TIE: plain if tied is None else bits.with_sign(plain, tied)}

    def reset(self, states: Mapping[str, Tensor]) -> None:
        """See `Form.reset`."""
        for kind, state in states.items():
            if kind == TIE:
                state.copy_(bits.sign_of(state))
            elif kind != LOW:
                state.zero_()

    def adam_(self, piece: Piece, options: AdamOptions) -> None:
        """See `Form.adam_`."""
        states = piece.states
        split_adam_(piece.param, states[LOW], piece.grad, states["exp_avg"], states[TIE], options)


class NarrowMoments(Form):
    """Moments in bfloat16, the second one rounded by chance. A master is float32, in two halves or whole.

    Args:
        has_halves: The parameter is bfloat16 and one half of its master; [Note: nudged split].
    """

    name = "bf16"
    is_plain = False
    _moments: Mapping[str, tuple[str, ...]] = {"exp_avg": (FIRST_BF16,), "exp_avg_sq": (SECOND_BF16,)}

    def __init__(self, *, has_halves: bool) -> None:
        self.has_halves = has_halves
        self._files = {**self._moments, **({"master": (NUDGED,)} if has_halves else {})}

    def encode(self, kind: str, value: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Form.encode`; rounds to nearest."""
        value = value.float()
        if kind == "master" and self.has_halves:
            return {NUDGED: bits.nudged_encode(value)[1]}
        if kind == "exp_avg_sq":
            _require_positive(value, self.name)
            return self._second(value)
        return self._first(value) if kind == "exp_avg" else {kind: value}

    def reset(self, states: Mapping[str, Tensor]) -> None:
        """See `Form.reset`."""
        super().reset({kind: state for kind, state in states.items() if kind != NUDGED})

    def adam_(self, piece: Piece, options: AdamOptions) -> None:
        """See `Form.adam_`."""
        low, first, *scale = (piece.states.get(file) for file in (NUDGED, *self._moments["exp_avg"]))
        second, *other = (piece.states[file] for file in self._moments["exp_avg_sq"])
        narrow_adam_(
            piece.param,
            low,
            piece.grad,
            cast(Tensor, first),
            second,
            options,
            Counter(_key(piece.name, options.step), piece.offset),
            scales=(cast(Tensor, scale[0]), other[0]) if other else None,
            out=piece.out,
        )

    def _first(self, value: Tensor) -> dict[str, Tensor]:
        return {FIRST_BF16: value}

    def _second(self, value: Tensor) -> dict[str, Tensor]:
        return {SECOND_BF16: bits.positive_bfloat16(value)}


class Log8Moments(NarrowMoments):
    """The same with moments in 8 bits: steps of their logarithm; [Note: logarithmic codes]."""

    name = "int8"
    _moments: Mapping[str, tuple[str, ...]] = {
        "exp_avg": (FIRST_LOG8, FIRST_SCALE),
        "exp_avg_sq": (SECOND_LOG8, SECOND_SCALE),
    }

    def _first(self, value: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._moments["exp_avg"], bits.signed_log8_encode(value), strict=True))

    def _second(self, value: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._moments["exp_avg_sq"], bits.log8_encode(value), strict=True))


def _require_positive(value: Tensor, form: str) -> None:
    if bool((value < 0).any()):
        raise CheckpointError(
            f"a second moment of Adam is negative, which no run of Adam makes, and state={form!r} keeps no sign of it: "
            "use state='fp32', or begin with the weights alone"
        )


def _key(name: str, step: int) -> int:
    """The key of a parameter's random bits in a step; nothing else decides them, so a resumed run has the same."""
    return int.from_bytes(blake2b(f"{step} {name}".encode(), digest_size=8).digest(), "little")


PLAIN = Form()
SPLIT = Split()
NARROW = {
    (cls.name, has_halves): cls(has_halves=has_halves)
    for cls in (NarrowMoments, Log8Moments)
    for has_halves in (False, True)
}
"""Forms with narrow moments, by name, and whether the parameter is one half of its master."""
