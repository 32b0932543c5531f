"""Blocks that do what makes recompute and early updates dangerous, equal to plain Lightning to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from lightning_ssd.errors import RecomputeError, SSDOffloadError
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from lightning_ssd.units.param_cache import ParamCache
from tests.helpers.training import assert_equal, train

WIDTH = 32


class Draws(nn.Module):
    """Stochastic depth from Python's and NumPy's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale = random.random() * float(np.random.rand())
        return x + scale * self.inner(x).tanh()


class UsesItselfDetached(nn.Module):
    """The weight is used with and without gradient: its values are read after its gradient is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * nn.Linear(WIDTH, WIDTH).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight.detach().mean(0)) @ self.weight + x


class CatchesErrors(nn.Module):
    """A second run ends by an exception, which this one takes for its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).tanh()
        try:
            return self.last(x)
        except Exception:
            return self.last(2 * x)


class WrapsErrors(CatchesErrors):
    """One that makes another exception of it."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.last(self.inner(x).tanh())
        except Exception as error:
            raise RuntimeError(f"failed on {tuple(x.shape)}") from error


class Counts(CatchesErrors):
    """Tells when it is run, and when to the end. To methods of lists: what it holds itself is put back."""

    begin = end = [].append

    def forward(self, x: Tensor) -> Tensor:
        self.begin(0)
        x = self.last(self.inner(x).tanh())
        self.end(0)
        return x


class SavesLessLater(CatchesErrors):
    """From the fifth run on, counted where nobody sees it; the fourth begins the second step."""

    def __init__(self) -> None:
        super().__init__()
        runs: list[int] = []
        self.begin, self.num_begun = runs.append, runs.__len__

    def forward(self, x: Tensor) -> Tensor:
        self.begin(0)
        x = self.last(self.inner(x).tanh())
        return x.sin() if self.num_begun() < 5 else x


class Net(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.tok = nn.Embedding(97, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 97)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("block", [Draws, UsesItselfDetached, CatchesErrors, WrapsErrors])
def test_equal(tmp_path: Path, block: Callable[[], nn.Module], activations: str) -> None:
    strategy = SSDOffloadStrategy(
        host_memory="min",
        min_unit_numel=0,
        update="torch",
        activations=activations,  # type: ignore[arg-type]
    )
    plain = train(tmp_path, lambda: Net(block))
    assert_equal(plain, train(tmp_path, lambda: Net(block), strategy))


def min_strategy() -> SSDOffloadStrategy:
    return SSDOffloadStrategy(host_memory="min", min_unit_numel=0)


def test_second_runs_stop_when_nothing_is_left_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    ended: list[int] = []
    monkeypatch.setattr(Counts, "begin", begun.append)
    monkeypatch.setattr(Counts, "end", ended.append)
    num_blocks, num_steps = 3, 3
    train(tmp_path, lambda: Net(Counts), min_strategy(), max_steps=num_steps)
    assert len(begun) == num_blocks * (2 * num_steps + 1)
    assert len(ended) == num_blocks * (num_steps + 1)  # each is tried once, to the end


def test_a_forward_that_saves_less_the_second_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecomputeError, match="tensors were saved, then"):
        train(tmp_path, lambda: Net(SavesLessLater), min_strategy(), max_steps=2)


def test_an_error_of_ours_in_a_second_run_that_stops_is_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_module = ParamCache.end_module
    begun: list[int] = []

    def fail(self: ParamCache) -> None:
        end_module(self)
        if len(begun) == 3 * 3 + 3 + 1:  # the first second run of the second step
            raise DiskFailure("disk full")

    class DiskFailure(SSDOffloadError):
        pass

    monkeypatch.setattr(Counts, "begin", begun.append)
    monkeypatch.setattr(ParamCache, "end_module", fail)
    with pytest.raises(DiskFailure, match="disk full"):
        train(tmp_path, lambda: Net(Counts), min_strategy(), max_steps=3)
