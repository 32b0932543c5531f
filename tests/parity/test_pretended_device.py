"""The route and the landing of a GPU, on a pretended device: the bits of plain Lightning, and memory within bounds.

Copies end at the last moment that the contract allows, and at random ones before it; see `tests.helpers.fake_device`.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest

from lightning_ssd.memory.device_plan import tensors_nbytes
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from lightning_ssd.units.param_cache import ParamCache
from lightning_ssd.units.unit import Unit
from tests.helpers.fake_device import pretend
from tests.helpers.models import GPT, FunctionalTie
from tests.helpers.plans import choose_plan
from tests.helpers.training import Tokens, assert_equal, train
from tests.parity.test_any_plan import MODELS, OPTIONS, random_choices

pytestmark = pytest.mark.not_simulated(reason="the CPU stands for the device here")


@pytest.mark.parametrize("seed", range(10))
def test_any_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    make_net, data = MODELS[seed % len(MODELS)]
    options: dict[str, Any] = OPTIONS[seed % len(OPTIONS)] | {"max_steps": 12}
    expected = train(tmp_path, make_net, data=data(), **options)
    choose_plan(monkeypatch, lambda draft: random_choices(rng, draft))
    routes = pretend(monkeypatch, rng)
    strategy = SSDOffloadStrategy(
        host_memory="1GiB",
        min_unit_numel=rng.choice([0, 1000]),
        update="torch",
        activations=rng.choice(["recompute", "keep"]),
        window=rng.choice(["auto", 1, 3]),
        overlap=rng.choice(["auto", "auto", "off"]),
    )
    assert_equal(expected, train(tmp_path, make_net, strategy, data=data(), **options))
    assert [placement._nbytes for placement in routes] == [0]
    assert not routes[0]._sending


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.5}], ids=str)
@pytest.mark.parametrize("make_net", [GPT, functools.partial(GPT, tie=True), FunctionalTie], ids=str)
def test_smallest_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_net: Any, options: dict[str, Any]) -> None:
    expected = train(tmp_path, make_net, **options)
    pretend(monkeypatch, random.Random(0))
    strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0, update="torch")
    assert_equal(expected, train(tmp_path, make_net, strategy, **options))


def test_parameters_take_no_more_than_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routes = pretend(monkeypatch, random.Random(0))
    seen: list[int] = []
    fetch = ParamCache.fetch

    def watched(self: ParamCache, unit: Any) -> bool:
        is_new = fetch(self, unit)
        seen.append(routes[0]._nbytes)
        return is_new

    monkeypatch.setattr(ParamCache, "fetch", watched)
    strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0)
    train(tmp_path, functools.partial(GPT, layers=6), strategy, data=Tokens(400))
    units = [tensors_nbytes(e.nbytes for e in unit.layout.entries) for unit in strategy.session.units]
    assert max(seen) <= routes[0]._capacity_nbytes == 2 * max(units) + units[0]
    assert routes[0]._capacity_nbytes < sum(units) / 2


def test_the_block_at_the_turn_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routes = pretend(monkeypatch, random.Random(0))
    strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0, activations="recompute")
    reads: list[str] = []
    read = Unit.read
    monkeypatch.setattr(Unit, "read", lambda self, store, buffer: (reads.append(self.name), read(self, store, buffer)))
    train(tmp_path, functools.partial(GPT, layers=4), strategy, max_steps=3)
    assert len(routes) == 1
    # Blocks are read in forward and again in backward, but for the last one, of which one read a step is enough.
    num = {name: reads.count(name) for name in set(reads)}
    assert num["net.blocks.3"] <= 4
    assert num["net.blocks.0"] >= 6
