"""The forms that the state of a unit may have in its files, one class each, and what an update does with them.

A form says which kinds of files take the place of which kind of state, how values become their bytes, and which kernel
updates them. What is read from files is decoded in `codec.encodings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_ssd.codec.encodings import LOW, TIE
from lightning_ssd.errors import CheckpointError
from lightning_ssd.kernels import bits
from lightning_ssd.kernels.options import AdamOptions
from lightning_ssd.kernels.stored import split_adam_


class Form:
    """State as it is computed: one file a kind.

    Attributes:
        name: The option ``state`` that asks for it.
        is_plain: Files have what is computed, so that any rule can update them.
    """

    name = "fp32"
    is_plain = True
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

    def adam_(self, param: Tensor, grad: Tensor, states: Mapping[str, Tensor], options: AdamOptions) -> None:
        """One step of Adam on a piece of one parameter, in place.

        Args:
            param: What the file ``param`` has.
            grad: The gradient.
            states: What the other files have, by kind.
            options: Of the step.
        """
        raise NotImplementedError(f"state={self.name!r} is updated by rules")


class Split(Form):
    """A float32 master in two halves, of which the upper one is the bfloat16 parameter. Exact; [Note: split]."""

    name = "split"
    is_plain = False
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
        if bool((value < 0).any()):
            raise CheckpointError(
                "a second moment of Adam is negative, which no run of Adam makes; state='split' keeps a bit in its "
                "sign: use state='fp32', or begin with the weights alone"
            )
        plain = bits.without_sign(value)
        return {TIE: plain if tied is None else bits.with_sign(plain, tied)}

    def reset(self, states: Mapping[str, Tensor]) -> None:
        """See `Form.reset`."""
        for kind, state in states.items():
            if kind == TIE:
                state.copy_(bits.sign_of(state))
            elif kind != LOW:
                state.zero_()

    def adam_(self, param: Tensor, grad: Tensor, states: Mapping[str, Tensor], options: AdamOptions) -> None:
        """See `Form.adam_`."""
        split_adam_(param, states[LOW], grad, states["exp_avg"], states[TIE], options)


PLAIN = Form()
SPLIT = Split()
