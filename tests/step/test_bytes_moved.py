"""It really streams: what the engine counts in a step is what the units' layouts say must move."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_ssd.io.engine import IOStats
from lightning_ssd.session.session import Session
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from lightning_ssd.units.unit import Unit
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
        trainer.strategy.session.drain()
        now = trainer.strategy.stats()
        read, written = now.read_nbytes - self.before.read_nbytes, now.written_nbytes - self.before.written_nbytes
        self.steps.append(IOStats(read, written))
        self.before = now


def run(tmp_path: Path, make_net: Callable[[], nn.Module], **settings: Any) -> tuple[list[IOStats], Session]:
    counters = Counters()
    options = {name: settings.pop(name) for name in ("precision", "gradient_clip_val") if name in settings}
    callbacks = settings.pop("callbacks", [counters])
    strategy = SSDOffloadStrategy(**({"host_memory": "min", "min_unit_numel": 0, "update": "native"} | settings))
    data = Images(400) if make_net is ViT else Tokens(400)
    result = train(tmp_path, make_net, strategy, data=data, max_steps=STEPS, callbacks=callbacks, **options)
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


@pytest.mark.not_simulated(reason="on a device units are not read ahead: they stay there, and copies run ahead")
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
    # The last unit of forward is the first of backward, and stays.
    turn = nbytes([unit for unit in units if unit.name == ("net.tok" if model in EXTRA_READS else "net.head")])
    # An update in float32 needs the parameter, which is the master, and two moments, and writes all three. Beside
    # backward it takes the parameter from memory.
    in_memory = [unit for unit in trained if overlap == "auto" and in_backward(unit, net)]
    moved = forward + backward + extra - turn + nbytes(trained, times=3) - nbytes(in_memory)
    first = units[0].layout.data_nbytes  # read ahead for the next step, or not yet
    for step in steps[1:]:
        assert step.read_nbytes == pytest.approx(moved, rel=0.01, abs=first)
    for step in steps:
        assert step.written_nbytes == nbytes(trained, times=3)


@pytest.mark.not_simulated(reason="on a device units are not read ahead: they stay there, and copies run ahead")
@pytest.mark.parametrize(
    ("state", "num_read", "num_written"),
    [("fp32", 12 + 4, 12 + 2), ("split", 10 + 4, 10 + 2), ("bf16", 6 + 4, 6 + 2), ("int8", 4 + 4, 4 + 2)],
)
def test_forms_of_the_state_move_the_bytes_of_their_table(
    tmp_path: Path, state: str, num_read: int, num_written: int
) -> None:
    """Bytes per parameter and step under ``bf16-true``: forward and backward read 2, the update the rest."""
    steps, session = run(tmp_path, GPT, state=state, precision="bf16-true")
    net, units = GPT(), session.units
    numel = sum(unit.layout.numel for unit in units)
    num_blocks = (
        sum(-(-math.prod(shape.shape) // 128) for unit in units for shape in unit.shapes) if state == "int8" else 0
    )
    # What backward does not read, its update reads, where the parameter is one half of the master.
    unread = [unit.layout.data_nbytes for unit in units if not in_backward(unit, net)] if state == "fp32" else []
    turn = next(unit.layout.data_nbytes for unit in units if unit.name == "net.head")
    first = units[0].layout.data_nbytes  # read ahead for the next step, or not yet
    for step in steps[1:]:
        assert step.read_nbytes == pytest.approx(
            num_read * numel + 8 * num_blocks - sum(unread) - turn, rel=0.01, abs=first
        )
        assert step.written_nbytes == num_written * numel + 8 * num_blocks


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_with_enough_memory_the_disk_is_silent(tmp_path: Path, options: dict[str, Any], precision: str) -> None:
    steps, session = run(tmp_path, GPT, host_memory="512MiB", precision=precision, **options)
    assert session.plan is not None
    assert session.plan.fits
    assert [(step.read_nbytes, step.written_nbytes) for step in steps[1:]] == [(0, 0)] * (STEPS - 1)


@pytest.mark.not_simulated(reason="one more read of the first unit, not looked into: docs/results/simulated_cuda.md")
@pytest.mark.parametrize("overlap", ["auto", "off"])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}], ids=str)
@pytest.mark.parametrize(("precision", "state"), [("32-true", "auto"), ("bf16-true", "fp32"), ("bf16-true", "split")])
def test_what_forward_needs_first_is_updated_where_forward_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, state: str, options: dict[str, Any], overlap: str
) -> None:
    reads: list[str] = []
    read = StateStore.read

    def spy(self: StateStore, generation: Generation, *args: Any, **kwargs: Any) -> Any:
        if generation.layout.kind == "param":
            reads.append(generation.layout.unit)
        return read(self, generation, *args, **kwargs)

    class FromThirdStep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2:  # the order of use is known
                trainer.strategy.session.drain()
                reads.clear()

    monkeypatch.setattr(StateStore, "read", spy)
    run(tmp_path, GPT, overlap=overlap, precision=precision, state=state, callbacks=[FromThirdStep()], **options)
    # Forward begins with the positions, and backward does not read them. Their update does where they are the master,
    # or one half of it.
    assert reads.count("net") == (0 if state == "fp32" and precision == "bf16-true" else STEPS - 2)
