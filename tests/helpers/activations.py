"""Activation stores of any size, alone or under the strategy, whatever the session would take."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ssd.activations import saved_input
from lightning_ssd.activations.device_inputs import DeviceRoom
from lightning_ssd.activations.spill_files import SpillFiles
from lightning_ssd.activations.store import ActivationStore, FrameInputs
from lightning_ssd.device.streams import Streams, make_streams
from lightning_ssd.io.engine import Engine, IOOptions
from lightning_ssd.io.folder import Folder
from lightning_ssd.io.python_engine import PythonEngine
from lightning_ssd.io.scratch import Scratch
from lightning_ssd.memory.budget import SharedBudget
from lightning_ssd.memory.pool import Pool
from lightning_ssd.sizes import KiB
from lightning_ssd.step.module_hooks import ModuleHooks
from lightning_ssd.trace.recorder import Trace
from lightning_ssd.units.model_units import ModelUnits
from lightning_ssd.units.placement import InPlace
from tests.helpers.faulty import FaultyEngine, When
from tests.helpers.pools import num_lent

BUFFER_NBYTES = 8 * KiB
NUMEL = 20_000  # 80 KB: ten pieces, the last not full
NBYTES = 80 * KiB  # of its aligned bytes


class Bench:
    """A store and what it works with."""

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        *,
        budget: int | None = 0,
        num_buffers: int = 3,
        buffer_nbytes: int = BUFFER_NBYTES,
        device: str = "cpu",
        streams: Streams | None = None,
        room: DeviceRoom | None = None,
        trace: Trace | None = None,
        **options: Any,
    ) -> None:
        self.engine = engine
        self.trace = trace or Trace()
        self.num_spilled = 0
        self.folder = Folder.open(str(directory))
        self.files = SpillFiles([Scratch(self.folder, True, engine.patience)], "activations")
        self.pool = Pool(num_buffers * buffer_nbytes, "activation", poison=True)
        self.budget = SharedBudget(saved_inputs_nbytes=budget)
        self.store = ActivationStore(
            engine,
            self.files,
            self.pool,
            device=torch.device(device),
            streams=streams or make_streams(torch.device(device)),
            room=room or InPlace(),
            budget=self.budget,
            piece_nbytes=buffer_nbytes,
            trace=self.trace,
            **options,
        )

        take = self.files.take

        def counting(nbytes: int, unit: str) -> Any:
            self.num_spilled += 1
            return take(nbytes, unit)

        self.files.take = counting  # type: ignore[method-assign]

    @property
    def disk_nbytes(self) -> int:
        """Disk space that is reserved."""
        return disk_nbytes(self.files)

    @property
    def in_use_nbytes(self) -> int:
        return in_use_nbytes(self.files)

    @property
    def held_nbytes(self) -> int:
        return self.budget.held_saved_inputs_nbytes

    def wait_for_writes(self) -> None:
        """Everything that is being written is on disk."""
        writes = self.store._io._writes
        while writes:
            self.store._io.finish(writes.popleft())

    def assert_all_returned(self) -> None:
        """Nothing is lent, and no disk space is taken."""
        self.store.enforce_budget()
        self.wait_for_writes()
        # After a deadline nobody waits for a transfer again: it is collected when it has ended.
        tries = 500
        while self.store._io._abandoned and (tries := tries - 1):
            self.store._io.drop_abandoned()
            time.sleep(0.01)
        self.store.enforce_budget()
        assert num_lent(self.pool) == 0
        assert self.in_use_nbytes == 0
        assert self.held_nbytes == 0


def disk_nbytes(files: SpillFiles) -> int:
    """Disk space that is reserved."""
    return sum(spill.file.nbytes for spill in files._files)


def in_use_nbytes(files: SpillFiles) -> int:
    """Disk space that extents have."""
    return disk_nbytes(files) - sum(nbytes for spill in files._files for _, nbytes in spill.free)


@contextmanager
def bench(directory: Path, engine: Engine | None = None, **options: Any) -> Iterator[Bench]:
    """A store that is closed afterwards, with its engine."""
    engine = engine or PythonEngine(IOOptions(num_threads=2, deadline_s=60))
    made = Bench(directory, engine, **options)
    try:
        yield made
    finally:
        made.store.close()
        made.folder.close()
        engine.close()


def values(seed: int, numel: int = NUMEL) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def keep(b: Bench, *seeds: int) -> list[FrameInputs]:
    """Frames as in a forward: each input is dropped by its caller before the next block runs."""
    frames = []
    for seed in seeds:
        b.store.enforce_budget()
        frames.append(b.store.save(f"unit {seed}", [values(seed)]))
    b.store.enforce_budget()
    return frames


def load_in_reverse(frames: list[FrameInputs], *seeds: int) -> None:
    for seed in reversed(seeds):
        assert torch.equal(frames.pop().load()[0], values(seed))


def load_all(frames: list[FrameInputs]) -> None:
    while frames:
        frames.pop().load()


def keep_and_load(b: Bench, num_frames: int, frames: list[FrameInputs]) -> None:
    for seed in range(num_frames):
        frames += keep(b, seed)
    load_all(frames)


@contextmanager
def faulty(directory: Path, *lines: When, **options: object) -> Iterator[Bench]:
    engine = FaultyEngine(PythonEngine(IOOptions(num_threads=2)), lines)
    with bench(directory, engine, **options) as b:
        yield b


Spilling = Callable[..., list[Bench]]


@pytest.fixture
def spilling(monkeypatch: pytest.MonkeyPatch) -> Spilling:
    """`spill_inputs` until the test ends."""
    return functools.partial(spill_inputs, monkeypatch)


def spill_inputs(monkeypatch: pytest.MonkeyPatch, *, min_nbytes: int = 1, **options: Any) -> list[Bench]:
    """Have every session keep the inputs of its blocks in a store of the given settings; returns those it makes.

    Everything is large enough to be kept, unless a test says otherwise.
    """
    monkeypatch.setattr(saved_input, "MIN_NBYTES", min_nbytes)
    init, close = ModuleHooks.__init__, ModuleHooks.close
    made: list[Bench] = []

    def with_ours(self: ModuleHooks, module: nn.Module, *, model: ModelUnits, **kwargs: Any) -> None:
        store = model.store
        device, path = kwargs["device"].type, Path(store.disks.all[0].path)
        ours = Bench(path, store.engine, trace=kwargs["trace"], device=device, **options)
        made.append(ours)
        init(self, module, model=model, **(kwargs | {"activations": ours.store}))

    def close_ours(self: ModuleHooks) -> None:
        close(self)
        for ours in made:
            ours.store.close()
            ours.folder.close()

    monkeypatch.setattr(ModuleHooks, "__init__", with_ours)
    monkeypatch.setattr(ModuleHooks, "close", close_ours)
    return made
