"""It really streams: what the engine counts in a step is what the units' layouts say must move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_ssd.io.engine import IOStats
from lightning_ssd.strategy.lightning_face import SSDOffloadStrategy
from lightning_ssd.strategy.session import Session
from lightning_ssd.streaming.unit import Unit
from tests.helpers.models import GPT, FunctionalTie, ViT
from tests.helpers.training import Images, Tokens, train

STEPS = 4


def frozen() -> nn.Module:
    net = GPT()
    net.tok.requires_grad_(False)
    net.blocks[0].requires_grad_(False)
    net.blocks[2].up.requires_grad_(False)  # this block is two units
    return net


class Counters(pl.Callback):
    """Bytes moved in each step."""

    def __init__(self) -> None:
        self.steps: list[IOStats] = []

    def on_train_start(self, trainer: Any, *args: Any) -> None:
        self.before = trainer.strategy.stats()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        now = trainer.strategy.stats()
        read, written = now.read_nbytes - self.before.read_nbytes, now.written_nbytes - self.before.written_nbytes
        self.steps.append(IOStats(read, written))
        self.before = now


def run(tmp_path: Path, make_net: Callable[[], nn.Module], **settings: Any) -> tuple[list[IOStats], Session]:
    counters = Counters()
    strategy = SSDOffloadStrategy(**({"host_memory": "min", "min_unit_numel": 0, "update": "native"} | settings))
    data = Images(400) if make_net is ViT else Tokens(400)
    result = train(tmp_path, make_net, strategy, data=data, max_steps=STEPS, callbacks=[counters])
    return counters.steps, result.trainer.strategy.session  # type: ignore[attr-defined]


def is_trained(unit: Unit) -> bool:
    return any(param.requires_grad for param in unit.params)


def nbytes(units: list[Unit], *, times: int = 1) -> int:
    return times * sum(unit.layout.data_nbytes for unit in units)


def in_backward(unit: Unit, net: nn.Module) -> bool:
    """Whether backward reads the values again: not those of embeddings, nor of what is only added."""
    modules = dict(net.named_modules())
    owners = [modules[name.removeprefix("net.").rpartition(".")[0]] for name in unit.names]
    return any(isinstance(owner, (nn.Linear, nn.LayerNorm, nn.Conv2d)) for owner in owners)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": GPT,
    "tied": functools.partial(GPT, tie=True),
    "functional tie": FunctionalTie,
    "frozen": frozen,
    "vit": ViT,
}

# Uses in forward and in backward beyond one each: a tied embedding is looked up at one end and multiplied at the other.
EXTRA_READS = {"tied": ("net.tok", 2), "functional tie": ("net.tok", 2)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("overlap", ["auto", "off"])
def test_every_byte_comes_and_goes_in_every_step(tmp_path: Path, model: str, activations: str, overlap: str) -> None:
    steps, session = run(tmp_path, MODELS[model], activations=activations, overlap=overlap)
    net, units = MODELS[model](), session.units
    trained = [unit for unit in units if is_trained(unit)]
    forward = nbytes(units)
    backward = nbytes([unit for unit in units if in_backward(unit, net)])
    name, times = EXTRA_READS.get(model, ("", 0))
    extra = nbytes([unit for unit in units if unit.name == name], times=times)
    # An update in float32 reads the parameter, which is the master, and two moments, and writes all three.
    assert steps[0].read_nbytes == pytest.approx(forward + backward + extra + nbytes(trained), rel=0.01)
    for step in steps[1:]:
        assert step.read_nbytes == pytest.approx(forward + backward + extra + nbytes(trained, times=3), rel=0.01)
    for step in steps:
        assert step.written_nbytes == nbytes(trained, times=3)


def test_with_memory_fewer_bytes_are_read_and_the_same_written(tmp_path: Path) -> None:
    least, session = run(tmp_path, GPT)
    cached, _ = run(tmp_path, GPT, host_memory="512MiB")
    # What a step updates is read anew; what it reads twice, in forward and backward, comes from memory the second time.
    assert cached[-1].read_nbytes <= least[-1].read_nbytes - nbytes(session.units) * 0.9
    assert [step.written_nbytes for step in cached] == [step.written_nbytes for step in least]


def test_frozen_units_stay_in_memory_where_there_is_room(tmp_path: Path) -> None:
    def all_but_head() -> nn.Module:
        net = GPT()
        net.requires_grad_(False)
        net.head.requires_grad_(True)
        return net

    steps, session = run(tmp_path, all_but_head, host_memory="512MiB")
    head = [unit for unit in session.units if is_trained(unit)]
    assert [unit.name for unit in head] == ["net.head"]
    assert steps[-1].read_nbytes <= nbytes(head, times=4) * 1.01
