"""A unit's states: the table of legal moves is the whole truth."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from lightning_ssd.errors import ResidencyError
from lightning_ssd.units.partition import UnitSpec
from lightning_ssd.units.unit import Residency, Unit

ON_DISK, READING, STAGED, RESIDENT = Residency
LEGAL = {
    (ON_DISK, READING),
    (ON_DISK, STAGED),
    (READING, STAGED),
    (READING, ON_DISK),
    (STAGED, RESIDENT),
    (STAGED, ON_DISK),
    (RESIDENT, STAGED),
    (RESIDENT, ON_DISK),
}


def unit(dtype: torch.dtype | None = None) -> Unit:
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.zeros(()))]
    return Unit(UnitSpec("blocks.0", ["a", "b", "c"], params), dtype)


@pytest.mark.parametrize(("before", "after"), list(product(Residency, Residency)))
def test_moves(before: Residency, after: Residency) -> None:
    moved = unit()
    moved.state = before
    if (before, after) in LEGAL:
        moved.move(after)
        assert moved.state is after
    else:
        with pytest.raises(ResidencyError, match=rf"unit 'blocks.0': {before.name} -> {after.name} is not a move"):
            moved.move(after)
        assert moved.state is before


def test_parameters_stand_in_file_order_in_every_kind() -> None:
    made = unit(torch.bfloat16)
    assert made.names == ("b", "a", "c")  # the one that keeps the others aligned comes first
    assert [tuple(param.shape) for param in made.params] == [(4, 8), (3,), ()]
    assert made.layout.dtype == "BF16"
    assert made.dtype == torch.bfloat16
    master = made.layout_of("master", "F32")
    assert [entry.name for entry in master.entries] == list(made.names)
    assert master.numel == made.layout.numel == 36


def test_integer_parameters_keep_their_dtype() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False)
    assert Unit(UnitSpec("ids", ["ids"], [param]), torch.bfloat16).layout.dtype == "I32"
