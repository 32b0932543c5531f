"""Float32 masters of 16-bit values that somebody wrote to: what was not written keeps its master.

[Note: masters and values] A 16-bit value is its master, rounded. Where it is not, it was written by the user, by a hook
or a callback, or another one was loaded: then the value is what counts, and the master is made anew from it, element by
element. So a parameter of which a part was written, or whose neighbours in the unit were, loses nothing of the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.mapped import snapshot
from lightning_ssd.units.unit import Unit

_PIECE_NUMEL = 1 << 20  # compared at a time


def master_of(value: Tensor, master: Tensor) -> Tensor:
    """``master`` itself if it rounds to ``value`` everywhere, else a new one; [Note: masters and values]."""
    value = value.detach().cpu()
    flat, values = master.reshape(-1), value.reshape(-1)
    pieces = [slice(begin, begin + _PIECE_NUMEL) for begin in range(0, flat.numel(), _PIECE_NUMEL)]
    if all(torch.equal(flat[piece].to(value.dtype), values[piece]) for piece in pieces):
        return master
    made = torch.empty_like(flat)
    for piece in pieces:
        is_rounded = flat[piece].to(value.dtype) == values[piece]
        torch.where(is_rounded, flat[piece], values[piece].to(flat.dtype), out=made[piece])
    return made.view(master.shape)


def follow_values(store: StateStore, unit: Unit) -> None:
    """The parameters of ``unit`` were written to and are in the store: let their masters follow."""
    generation = store.current(unit.name, "master")
    if generation is not None:
        masters = snapshot(store, generation)
        store.put(generation.layout, lambda i: master_of(unit.params[i].data, masters[i]))
