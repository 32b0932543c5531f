"""Loading an optimizer's state does all that `torch.optim.Optimizer.load_state_dict` does, and refuses what would fail.

All batches are alike, so that a run that goes on sees the same data wherever in its epoch it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer
from torch.utils.data import DataLoader

from lightning_ssd.errors import CheckpointError
from tests.helpers.training import make_trainer, streamed

DATA = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).repeat(4, 1)
Make = Callable[[Any], Optimizer]


class Net(pl.LightningModule):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self._make = make
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self._make(self.parameters())


def go(folder: Path, strategy: Any, make: Make, steps: int, path: Path | None = None) -> list[Any]:
    """Train, save, and give everything that shows."""
    pl.seed_everything(1, verbose=False)
    module, trainer = Net(make), make_trainer(folder, strategy, max_steps=steps)
    trainer.fit(module, DataLoader(DATA, 4), ckpt_path=None if path is None else str(path))
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    state = trainer.optimizers[0].state_dict()
    entries = {number: {k: float(v.sum()) for k, v in entry.items()} for number, entry in state["state"].items()}
    options = [{k: v for k, v in group.items() if k != "foreach"} for group in state["param_groups"]]
    return [module.losses, entries, options, {name: float(v.sum()) for name, v in module.state_dict().items()}]


def hooked(params: Any) -> Optimizer:
    """Saves its state under other names, loads half of its moments, and sets its rate."""
    made = AdamW(params, 1e-2)

    def after_dump(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "state": {f"n{number}": entry for number, entry in state["state"].items()}}

    def before_load(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        entries = {int(str(n).lstrip("n")): entry for n, entry in state["state"].items()}
        return {**state, "state": {n: {**e, "exp_avg": e["exp_avg"] * 0.5} for n, e in entries.items()}}

    made.register_state_dict_post_hook(after_dump)
    made.register_load_state_dict_pre_hook(before_load)
    made.register_load_state_dict_post_hook(lambda optimizer: optimizer.param_groups[0].update(lr=3e-3))
    return made


@pytest.mark.filterwarnings("ignore")
def test_hooks_of_an_optimizer_are_called(tmp_path: Path) -> None:
    def run(folder: Path, make: Callable[[], Any]) -> list[Any]:
        paths = [None, folder / "3.ckpt", folder / "6.ckpt"]
        return [go(folder, make(), hooked, 3 * i + 3, path) for i, path in enumerate(paths)]

    assert run(tmp_path / "ours", streamed) == run(tmp_path / "plain", lambda: "auto")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", [Adam, NAdam])
def test_a_class_completes_what_another_version_of_it_saved(tmp_path: Path, other: Make) -> None:
    """As torch 1 saved it: step counts are numbers, and options that came later are missing."""
    go(tmp_path, "auto", lambda params: other(params, 1e-2), 3)
    saved = torch.load(tmp_path / "3.ckpt", weights_only=False)
    for entry in saved["optimizer_states"][0]["state"].values():
        entry["step"] = int(entry["step"])
    for option in ("maximize", "capturable", "differentiable", "fused", "amsgrad"):
        saved["optimizer_states"][0]["param_groups"][0].pop(option, None)
    torch.save(saved, tmp_path / "old.ckpt")

    def run(folder: Path, make: Callable[[], Any]) -> list[Any]:
        optimizer = lambda params: AdamW(params, 1e-2)  # noqa: E731
        first = go(folder, make(), optimizer, 6, tmp_path / "old.ckpt")
        return [first, go(folder, make(), optimizer, 8, folder / "6.ckpt")]

    assert run(tmp_path / "ours", streamed) == run(tmp_path / "plain", lambda: "auto")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("saved", "now", "lacking"), [(AdamW, SGD, "momentum"), (SGD, AdamW, "betas")])
def test_the_state_of_another_class_is_refused(tmp_path: Path, saved: Any, now: Any, lacking: str) -> None:
    """In plain Lightning a ``KeyError`` in the first step."""
    go(tmp_path, streamed(), lambda params: saved(params, 1e-2), 2)
    with pytest.raises(CheckpointError, match=f"another class than {now.__name__}.* has no '{lacking}'"):
        go(tmp_path, streamed(), lambda params: now(params, 1e-2), 4, tmp_path / "2.ckpt")
