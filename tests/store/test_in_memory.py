"""Kinds in memory: one memory for all generations, a file only when asked for, and of the values of that moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_ssd.errors import StoreError
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.io.python_engine import PythonEngine
from lightning_ssd.store.layout import Shape, lay_out
from lightning_ssd.store.run_directory import RunDirectory
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.trace.recorder import Trace

LAYOUT = lay_out("unit", "param", [Shape("w", (3, 5)), Shape("none", (0,)), Shape("b", ())], "F32")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    options = IOOptions(num_threads=1)
    engine = PythonEngine(options)
    store = StateStore(
        [RunDirectory(str(tmp_path))], engine, options=options, direct=[False], verify=True, trace=Trace()
    )
    yield store
    store.close(remove=True)
    engine.close()


def tensors(value: float) -> list[Tensor]:
    return [torch.full(entry.shape, value) for entry in LAYOUT.entries]


def put(store: StateStore, value: float) -> None:
    store.put(LAYOUT, tensors(value).__getitem__)


def num_files(store: StateStore) -> int:
    return sum(name.endswith(".safetensors") for name in os.listdir(store.disks.all[0].path))


def values_on_disk(store: StateStore) -> float:
    current = store.current("unit", "param")
    assert current is not None
    found = load_file(store.on_disk(current).file.path)
    assert torch.equal(found["w"], found["b"].expand(3, 5))
    return found["b"].item()


def test_values_are_read_into_memory_and_changed_there(store: StateStore) -> None:
    put(store, 1.0)
    memory = tensors(0.0)
    store.hold_in_memory(LAYOUT, memory)
    assert memory[0][0, 0] == memory[2] == 1.0
    (generation,) = store.begin([LAYOUT])  # an update
    assert not generation.has_file
    assert generation.in_memory is not None
    assert all(a is b for a, b in zip(generation.in_memory, memory, strict=True))
    for tensor in memory:
        tensor.fill_(2.0)
    before = store.current("unit", "param")
    store.commit(generation)
    assert before is not None
    assert before.in_memory is None  # the memory is not its values any more
    assert values_on_disk(store) == 2.0


def test_a_file_is_written_once_and_dropped_when_the_memory_may_have_changed(store: StateStore) -> None:
    store.hold_in_memory(LAYOUT, tensors(0.0))
    put(store, 1.0)
    current = store.current("unit", "param")
    assert current is not None
    assert num_files(store) == 0
    with pytest.raises(StoreError, match="'unit' is in memory and has no file"):
        _ = current.file
    file = store.on_disk(current).file
    assert store.on_disk(current).file is file
    assert num_files(store) == 1
    for tensor in store.in_memory("unit", "param") or ():
        tensor.fill_(3.0)  # the user wrote to it
    store.drop_file(current)
    assert not current.has_file
    assert values_on_disk(store) == 3.0
    assert num_files(store) == 1  # the dropped file was used again


def test_zeros_need_no_tensors_and_memory_can_be_replaced(store: StateStore) -> None:
    store.hold_in_memory(LAYOUT, tensors(5.0))
    store.put(LAYOUT, lambda index: None)
    assert values_on_disk(store) == 0.0
    assert store.replace_in_memory(LAYOUT, others := tensors(9.0)) == tuple(others)
    put(store, 4.0)
    assert others[2] == 4.0
    assert values_on_disk(store) == 4.0


def test_an_update_that_failed_midway_damages_the_current_generation(store: StateStore) -> None:
    store.hold_in_memory(LAYOUT, tensors(0.0))
    put(store, 1.0)
    (generation,) = store.begin([LAYOUT])
    store.abandon(generation, "half of the unit was updated")
    with pytest.raises(StoreError, match="half of the unit was updated"):
        store.current("unit", "param")
    store.flush_in_memory()  # nothing of it is written
    assert store.current("unit", "param") is None
    assert num_files(store) == 0


def test_flush_writes_what_is_in_memory_and_forgets_it(store: StateStore) -> None:
    memory = tensors(0.0)
    store.hold_in_memory(LAYOUT, memory)
    put(store, 6.0)
    store.flush_in_memory()
    memory[2].fill_(7.0)
    assert store.in_memory("unit", "param") is None
    assert values_on_disk(store) == 6.0
    (generation,) = store.begin([LAYOUT])
    assert generation.has_file
    store.abandon(generation)
