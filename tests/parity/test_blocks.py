"""Blocks that do what makes recompute and early updates dangerous, equal to plain Lightning to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from lightning_ssd.strategy.lightning_face import SSDOffloadStrategy
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
@pytest.mark.parametrize("block", [Draws, UsesItselfDetached])
def test_equal(tmp_path: Path, block: Callable[[], nn.Module], activations: str) -> None:
    strategy = SSDOffloadStrategy(
        host_memory="min",
        min_unit_numel=0,
        update="torch",
        activations=activations,  # type: ignore[arg-type]
    )
    plain = train(tmp_path, lambda: Net(block))
    assert_equal(plain, train(tmp_path, lambda: Net(block), strategy))
