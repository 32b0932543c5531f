"""Every bit comes back: of parameters, buffers and optimizer state in each precision, and of masters beside 16 bits.

All batches are alike, so that a run that goes on sees the same data wherever in its epoch it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd import SSDOffloadPrecision
from lightning_ssd.convert.export import consolidate
from lightning_ssd.convert.importing import import_checkpoint
from lightning_ssd.session.handover import masters_of
from tests.helpers.training import make_trainer, streamed

DATA = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).repeat(2, 1)
Edit = Callable[[nn.Module], object]


class Net(pl.LightningModule):
    """Buffers of every kind that change in a step, a 0-dimensional parameter, a frozen one and two that are tied."""

    def __init__(self, half: torch.dtype | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8).to(half)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.body[0].weight
        self.scale = nn.Parameter(torch.tensor(1 / 3))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool):
            self.register_buffer("in_" + str(dtype).removeprefix("torch."), torch.zeros((), dtype=dtype))
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.first(batch.to(self.first.weight.dtype)).to(self.scale.dtype)
        loss = (self.frozen(self.tied(self.body(x))) * self.scale - 1).square().mean()
        for buffer in (self.in_float64, self.in_float32, self.in_bfloat16):
            buffer += 1 / 3
        self.in_int64 += 2**40
        self.in_bool.logical_not_()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Adam's eps is zero in float16.
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-2, momentum=0.9)


def go(
    folder: Path,
    strategy: Any,
    precision: Any,
    steps: int,
    path: Path | None = None,
    *,
    half: torch.dtype | None = None,
    callbacks: Any = (),
) -> tuple[Net, pl.Trainer]:
    pl.seed_everything(2 if path is None else 5, verbose=False)
    options = {"precision": precision} if isinstance(precision, str) else {"plugins": [precision]}
    module = Net(half)
    trainer = make_trainer(folder, strategy, max_steps=steps, callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(DATA, 4), ckpt_path=None if path is None else str(path))
    return module, trainer


def everything(module: Net, trainer: pl.Trainer) -> dict[str, Any]:
    found: dict[str, Any] = {name: value.detach().clone() for name, value in module.state_dict().items()}
    for number, entry in trainer.strategy.optimizers[0].state_dict()["state"].items():
        found |= {f"{number}.{key}": value.clone() for key, value in entry.items()}
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


PRECISIONS: dict[str, tuple[str, torch.dtype | None]] = {
    "64-true": ("64-true", None),
    "64-true, half module": ("64-true", torch.float16),
    "bf16-true": ("bf16-true", None),
    "16-true": ("16-true", None),
    "half module": ("32-true", torch.float16),
    "bfloat16 module": ("32-true", torch.bfloat16),
    "bfloat16 module, mixed": ("bf16-mixed", torch.bfloat16),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PRECISIONS)
def test_every_bit_comes_back(tmp_path: Path, name: str) -> None:
    """From our checkpoint, a plain one, an exported and an imported one: as the plain run that never stopped.

    Plain Lightning itself rounds what it loads under 64-true to 32 bits.
    """
    precision, half = PRECISIONS[name]

    def ours() -> Any:
        return SSDOffloadPrecision(precision, master_dtype="param")

    expected, trainer = go(tmp_path, "auto", precision, 6, half=half)
    every = everything(expected, trainer)
    _, trainer = go(tmp_path, "auto", precision, 3, half=half)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    module, trainer = go(tmp_path, streamed(), ours(), 3, half=half)
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    at_three = everything(module, trainer)
    consolidate(tmp_path / "ours.ckpt", tmp_path / "exported.ckpt")
    import_checkpoint(tmp_path / "ours.ckpt", tmp_path / "imported.ckpt")
    for path in ("ours.ckpt", "plain.ckpt", "exported.ckpt", "imported.ckpt"):
        module, trainer = go(tmp_path, streamed(), ours(), 3, tmp_path / path, half=half)
        assert_same(everything(module, trainer), at_three)
        module, trainer = go(tmp_path, streamed(), ours(), 6, tmp_path / path, half=half)
        assert_same(everything(module, trainer), every)
        assert module.losses == expected.losses[3:]


class Does(pl.Callback):
    """Does something in a hook, and looks at parameters and masters when training starts."""

    def __init__(self, hook: str = "", act: Callable[..., object] = id) -> None:
        if hook:
            setattr(self, hook, lambda trainer, module, *args, **kwargs: act(module, *args, **kwargs))
        self.values: dict[str, Tensor] = {}
        self.masters: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        with trainer.strategy.session.written_back():
            masters = masters_of(trainer.strategy.session)
            for name, param in module.named_parameters():
                self.values[name] = param.detach().clone()
                if param in masters:
                    self.masters[name] = masters[param].clone()


EDITED = ("first.weight", "body.0.weight", "tied.weight")


def edit(module: nn.Module) -> None:
    """A part of two parameters; the biases beside them are of the same units and stay."""
    with torch.no_grad():
        module.first.weight[2:4] *= 0.75
        module.body[0].weight[2:4] *= 0.75


def assign(module: nn.Module) -> None:
    for layer in (module.first, module.body[0]):
        layer.weight.data = torch.cat([layer.weight.data[:4], layer.weight.data[4:] * 0.75])


def edit_dictionary(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    for name in EDITED:
        checkpoint["state_dict"][name] = checkpoint["state_dict"][name].detach().clone()
        checkpoint["state_dict"][name][2:4] *= 0.75


WHEN: dict[str, tuple[str, Callable[..., object]]] = {
    "loaded": ("setup", lambda module, stage: setattr(module, "on_load_checkpoint", partial(edit_dictionary, module))),
    "saved": ("on_save_checkpoint", edit_dictionary),
    "placed": ("on_fit_start", edit),
    "assigned": ("on_fit_start", assign),
    "begins": ("on_train_start", edit),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(("precision", "host_memory"), [("bf16-true", "min"), ("32-true", "64MiB")])
def test_a_master_follows_the_value_that_was_put_in_its_place(
    tmp_path: Path, when: str, precision: str, host_memory: str
) -> None:
    """Where 16-bit values are others than their masters round to, they count; everything else keeps its 32 bits."""

    half = torch.bfloat16 if precision == "32-true" else None

    def fit(steps: int, path: Path | None = None, *callbacks: pl.Callback) -> Any:
        ours = SSDOffloadPrecision(precision, master_dtype="fp32")
        return go(tmp_path, streamed(host_memory=host_memory), ours, steps, path, half=half, callbacks=callbacks)

    def first(*callbacks: pl.Callback) -> Path:
        _, trainer = fit(3, None, *callbacks)
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return tmp_path / "saved.ckpt"

    looks = Does()
    fit(4, first(), looks)
    act, seen = Does(*WHEN[when]), Does()
    fit(4, first(act) if when == "saved" else first(), *([] if when == "saved" else [act]), seen)
    num_kept = 0
    for name, master in seen.masters.items():
        value, before = seen.values[name], looks.masters[name]
        assert (name in EDITED) != torch.equal(value, looks.values[name])
        assert torch.equal(master.to(value.dtype), value), name
        kept = before.to(value.dtype) == value
        assert torch.equal(master, torch.where(kept, before, value.float())), name
        num_kept += int(kept.sum())
    assert num_kept >= 40
