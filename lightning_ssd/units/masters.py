"""Float32 masters of 16-bit values after somebody wrote to the values.

[Note: masters and values] A 16-bit value is its master, rounded. An element for which that does not hold was written by
the user, a hook or a callback, or was loaded: its master is made from the value. Every other element keeps its master.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ssd.store.decoded import values_of
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.unit import Unit
from lightning_ssd.units.unit_state import put

_PIECE_NUMEL = 1 << 20  # compared at a time


def master_of(value: Tensor, master: Tensor) -> Tensor:
    """``master`` itself if it rounds to ``value`` everywhere, else a new one; [Note: masters and values]."""
    value, given = value.detach().cpu(), master
    master = values_of(master)
    flat, values = master.reshape(-1), value.reshape(-1)
    pieces = [slice(begin, begin + _PIECE_NUMEL) for begin in range(0, flat.numel(), _PIECE_NUMEL)]
    if all(torch.equal(flat[piece].to(value.dtype), values[piece]) for piece in pieces):
        return given
    made = torch.empty_like(flat)
    for piece in pieces:
        is_rounded = flat[piece].to(value.dtype) == values[piece]
        torch.where(is_rounded, flat[piece], values[piece].to(flat.dtype), out=made[piece])
    return made.view(master.shape)


def follow_values(store: StateStore, unit: Unit, masters: Sequence[Tensor] | None) -> None:
    """Make masters of ``unit`` fit its parameters, which were written to and are in the store.

    Args:
        store: Where they are.
        unit: The unit.
        masters: `tensors_of` its masters, from before the parameters were written; None if there were none.
    """
    if masters is not None:
        put(store, unit, "master", lambda i: master_of(unit.params[i].data, masters[i]))
