"""Blocks whose second forward would not be the first: equal to plain Lightning to the bit, recomputed or kept."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lightning_ssd.errors import RecomputeError
from lightning_ssd.step.trial import Verdicts
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.helpers.training import assert_equal, train

WIDTH = 32
CALLS = {"global": 0}


class Block(nn.Module):
    """Computes; what is around it is up to those below."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Linear(WIDTH, WIDTH)

    def compute(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).tanh())

    def forward(self, x: Any) -> Any:
        return self.compute(x)


# -- what is given -------------------------------------------------------------------------------------------------


@dataclass
class Graph:
    x: Tensor
    past: list[Tensor] = field(default_factory=list)
    by_name: dict[str, Tensor] = field(default_factory=dict)


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Pair(NamedTuple):
    x: Tensor
    log: deque[Tensor]


class OnDict(Block):
    make = staticmethod(lambda x: {"x": x})
    read = staticmethod(lambda given: given["x"])

    def forward(self, given: Any) -> Any:
        given["x"] = self.compute(given["x"])
        return given


class OnNestedList(Block):
    make = staticmethod(lambda x: {"skips": [x]})
    read = staticmethod(lambda given: sum(given["skips"]))

    def forward(self, given: Any) -> Any:
        given["skips"].append(self.compute(given["skips"][-1]))
        return given


class OnObject(Block):
    make = staticmethod(Graph)
    read = staticmethod(lambda given: given.x + given.by_name["last"])

    def forward(self, given: Any) -> Any:
        given.past.append(given.x)
        given.x = self.compute(sum(given.past))
        given.by_name["last"] = given.x * len(given.past)
        return given


class OnSlots(Block):
    make = staticmethod(Slotted)
    read = staticmethod(lambda given: given.x)

    def forward(self, given: Any) -> Any:
        given.x = self.compute(given.x)
        return given


class OnNamedTuple(Block):
    make = staticmethod(lambda x: Pair(x, deque([x])))
    read = staticmethod(lambda given: given.x + sum(given.log))

    def forward(self, given: Any) -> Any:
        given.log.rotate()
        given.log.append(self.compute(given.x * given.log[0]))
        return Pair(given.log[-1], given.log)


class ChangedByItsCaller(Block):
    """The block only reads the object; who calls it puts something else there before the next."""

    make = staticmethod(Graph)
    read = staticmethod(lambda given: given.x)

    def forward(self, given: Any) -> Any:
        return self.compute(given.x)


class InPlaceMemory(Block):
    """A recurrent memory, updated where it is."""

    make = staticmethod(lambda x: {"x": x, "memory": torch.ones(WIDTH)})
    read = staticmethod(lambda given: given["x"])

    def forward(self, given: Any) -> Any:
        given["x"] = self.compute(given["x"] + given["memory"])
        given["memory"].mul_(0.5).add_(given["x"].detach().mean((0, 1)))
        return given


# -- what it has ---------------------------------------------------------------------------------------------------


class OwnGenerators(Block):
    def __init__(self) -> None:
        super().__init__()
        self.torch = torch.Generator().manual_seed(3)
        self.others = [np.random.default_rng(3), random.Random(3)]

    def forward(self, x: Any) -> Any:
        mask = torch.rand(x.shape, generator=self.torch) < 0.7
        return self.compute(x * mask * self.others[0].random() * self.others[1].random())


class Anneals(Block):
    num_calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.state = {"scale": 1.0}
        self.calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        type(self).num_calls += 1
        CALLS["global"] += 1
        self.state["scale"] *= 0.9
        return self.compute(x * self.state["scale"] * (1 + 0.1 * self.calls + 0.01 * self.num_calls + CALLS["global"]))


class RunningValues(Block):
    """One replaced in each forward, one that is a buffer, and one of the kind that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(WIDTH)
        self.register_buffer("square", torch.ones(WIDTH))
        self.last: Tensor | None = None

    def forward(self, x: Any) -> Any:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        self.square = 0.9 * self.square + 0.1 * x.detach().square().mean((0, 1))
        history = 0.0 if self.last is None else self.last.detach()
        self.last = self.compute((x - self.mean) / self.square.sqrt() + history)
        return self.last


class InPlaceRunningValue(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(WIDTH)

    def forward(self, x: Any) -> Any:
        self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        return self.compute(x - self.mean)


class OwnIterator(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scales = itertools.cycle([1.0, 0.5, 0.25])

    def forward(self, x: Any) -> Any:
        return self.compute(x * next(self.scales))


class StartsLater(Block):
    """Nothing is to be seen of it in its first forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.scale = 1.0

    def forward(self, x: Any) -> Any:
        self.calls.append(len(self.calls))
        if len(self.calls) > 2:
            self.scale *= 0.5
        return self.compute(x * self.scale)


class WritesTheThirdTime(Block):
    """To a parameter, in another way than before."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def forward(self, x: Any) -> Any:
        self.num_calls += 1
        if self.num_calls == 3:
            self.inner.weight.detach().mul_(0.5)
        return self.compute(x)


# -- how it is called ----------------------------------------------------------------------------------------------


class ReturnsNothing(OnObject):
    def forward(self, x: Any) -> Any:
        super().forward(x)


class SelectsInside(Block):
    """A mode sees each operation of a part: in backward it must not see those that fetch the block."""

    def forward(self, x: Any) -> Any:
        saved = [torch.ops.aten.addmm.default]
        contexts = partial(create_selective_checkpoint_contexts, saved)
        return checkpoint(self.compute, x, use_reentrant=False, context_fn=contexts)


class Checkpointed(Block):
    def __call__(self, *args: Any) -> Any:
        return checkpoint(partial(super().__call__), *args, use_reentrant=False)


class ChecksPart(Block):
    def forward(self, x: Any) -> Any:
        return self.outer(checkpoint(self.compute, self.inner(x), use_reentrant=False)) + x


class FromOutside(Block):
    """Runs with other values than its own."""

    def __call__(self, x: Any) -> Any:
        if not torch.is_grad_enabled() or getattr(self, "is_inside", False):
            return super().__call__(x)
        self.is_inside = True
        values = {"inner.weight": torch.full((WIDTH, WIDTH), 0.01), "outer.bias": x.mean((0, 1))}
        try:
            return torch.func.functional_call(self, values, (x,))
        finally:
            self.is_inside = False


class Net(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.tok = nn.Embedding(97, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 97)
        Anneals.num_calls = CALLS["global"] = 0

    def forward(self, ids: Tensor) -> Tensor:
        kind: Any = type(self.blocks[0])
        given = kind.make(self.tok(ids)) if hasattr(kind, "make") else self.tok(ids)
        for block in self.blocks:
            if kind is ReturnsNothing:
                block(given)
            elif kind is ChangedByItsCaller:
                given.x = block(given)
            else:
                given = block(given)
        return self.head(kind.read(given) if hasattr(kind, "read") else given)


def min_strategy() -> SSDOffloadStrategy:
    return SSDOffloadStrategy(host_memory="min", min_unit_numel=0, update="torch")


GIVEN = [OnDict, OnNestedList, OnObject, OnSlots, OnNamedTuple, ChangedByItsCaller, ReturnsNothing]
HAVING = [OwnGenerators, Anneals, RunningValues, StartsLater]
CALLED = [Checkpointed, ChecksPart, SelectsInside, FromOutside]
KEEPING = [InPlaceMemory, InPlaceRunningValue, OwnIterator]


@pytest.mark.not_simulated(
    reason="plain Lightning does not run it on a device either",
    only=["OwnGenerators", "RunningValue", "FromOutside", "InPlaceMemory"],
)
@pytest.mark.parametrize("block", [*GIVEN, *HAVING, *CALLED, *KEEPING])
def test_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: type[Block]) -> None:
    kept: list[str] = []
    keep = Verdicts.keep

    def note(self: Verdicts, module: nn.Module, name: str, reason: str) -> None:
        kept.append(name)
        keep(self, module, name, reason)

    monkeypatch.setattr(Verdicts, "keep", note)
    plain = train(tmp_path, lambda: Net(block), max_steps=4)
    assert_equal(plain, train(tmp_path, lambda: Net(block), min_strategy(), max_steps=4))
    assert len(kept) == (3 if block in KEEPING else 0)


class FailsLater(Block):
    """In its fifth run, counted where nobody sees it; the fourth begins the second step."""

    def __init__(self) -> None:
        super().__init__()
        runs: list[int] = []
        self.begin, self.num_begun = runs.append, runs.__len__

    def forward(self, x: Any) -> Any:
        self.begin(0)
        if self.num_begun() == 5:
            raise LookupError("nothing left")
        return self.compute(x)


def test_an_error_in_a_second_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecomputeError, match=r"blocks\.2'.*second time.*nothing left.*activations='keep'") as caught:
        train(tmp_path, lambda: Net(FailsLater), min_strategy(), max_steps=2)
    assert isinstance(caught.value.__cause__, LookupError)


def test_a_write_to_parameters_after_the_first_forward_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(RecomputeError, match=r"blocks\.0'.*wrote to its parameters.*activations='keep'"):
        train(tmp_path, lambda: Net(WritesTheThirdTime), min_strategy(), max_steps=4)


class Shares(Block):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Any) -> Any:
        return self.compute(x) + self.shared(x)


class SharingNet(Net):
    def __init__(self) -> None:
        shared = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU())])
        super().__init__(lambda: Shares(shared))


def test_blocks_that_share_a_module_work_in_the_smallest_memory(tmp_path: Path) -> None:
    assert_equal(train(tmp_path, SharingNet), train(tmp_path, SharingNet, min_strategy()))


class Llama(nn.Module):
    """Two segments, the second of which attends to the cache of the first."""

    def __init__(self, cache: str) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        self.cache = cache
        self.config = transformers.LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        self.model = transformers.LlamaForCausalLM(self.config)
        self.static = transformers.StaticCache

    def forward(self, ids: Tensor) -> Tensor:
        first, second = ids.chunk(2, -1)
        if self.cache == "static":
            past = self.static(config=self.config, max_cache_len=ids.shape[1])
            with torch.no_grad():
                self.model(first, past_key_values=past, use_cache=True)
            return torch.cat([self.model(second, past_key_values=past, use_cache=True).logits] * 2, 1)
        made = self.model(first, use_cache=True)
        return torch.cat([made.logits, self.model(second, past_key_values=made.past_key_values).logits], 1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_are_what_they_are(tmp_path: Path, cache: str) -> None:
    plain = train(tmp_path, partial(Llama, cache), max_steps=3)
    assert_equal(plain, train(tmp_path, partial(Llama, cache), min_strategy(), max_steps=3))
