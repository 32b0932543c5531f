"""`ImportSource` alone: which tensor of several forms is the value, what is a parameter, what a tied name leads to."""

from __future__ import annotations

import pytest
import torch

from lightning_ssd.convert.sources import ImportSource, add_state, state_kinds, tensor_ref
from lightning_ssd.errors import CheckpointError


@pytest.fixture
def source() -> ImportSource:
    source = ImportSource("x")
    source.add("w", tensor_ref(torch.ones(2, 3, dtype=torch.bfloat16)))
    source.add("w", tensor_ref(torch.full((2, 3), 1.001)), kind="master")
    source.add("count", tensor_ref(torch.tensor(3)))
    source.add("freqs", tensor_ref(torch.ones(2, dtype=torch.complex128)))
    source.aliases["tied"] = "w"
    return source


def test_integers_and_what_the_format_lacks_are_buffers(source: ImportSource) -> None:
    assert list(source.parameters) == ["w"]
    assert list(source.buffers) == ["count", "freqs"]
    assert source.buffers["freqs"].dtype == ""


def test_the_master_is_the_value_under_every_name(source: ImportSource) -> None:
    assert source.value("w").dtype == source.value("tied").dtype == "F32"
    assert source.shapes == {"w": (2, 3), "count": (), "freqs": (2,), "tied": (2, 3)}
    assert torch.equal(source.value("count").load(), torch.tensor(3))
    source.parameters["v"] = {"exp_avg": tensor_ref(torch.ones(1))}
    with pytest.raises(CheckpointError, match="x: 'v' has optimizer state but no value"):
        source.value("v")


def test_optimizer_state_goes_by_its_shape(source: ImportSource) -> None:
    row = torch.ones(2)
    values = {"step": torch.tensor(4.0), "exp_avg": torch.zeros(2, 3), "row": row, "lr": 0.5}
    assert add_state(source, 1, "tied", values) == {"step": torch.tensor(4.0), "lr": 0.5}
    assert list(source.parameters["w"]) == ["param", "master", "exp_avg"]
    assert source.extra_state == {1: {"tied": {"row": row}}}
    assert state_kinds(source, ["w"]) == ["exp_avg"]


def test_what_it_holds_open_is_closed_with_it() -> None:
    closed: list[str] = []
    with ImportSource("x") as source:
        source.stack.callback(closed.append, "file")
        assert closed == []
    assert closed == ["file"]
