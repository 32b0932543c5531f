"""Hooks change what Lightning dumps; what is saved is what they leave, and comes back as from a plain file.

All batches are alike, so that a run that goes on sees the same data wherever in its epoch it is.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.checkpoint.link_file import mark_of
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.manifest import MANIFEST
from lightning_ssd.checkpoint.manifest_json import seal
from lightning_ssd.convert.export import consolidate
from lightning_ssd.errors import CheckpointError
from tests.helpers.training import make_trainer, streamed

Change = Callable[[dict[str, Any]], object]
DATA = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).repeat(4, 1)


class Net(pl.LightningModule):
    """Tied, frozen and normalised, with hooks that are given."""

    def __init__(self, on_save: Change = id, on_load: Change = id) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.net[0].weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self._on_save, self._on_load = on_save, on_load
        self.losses: list[float] = []
        self.keys: list[str] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.frozen(self.tied(self.net(batch))) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    test_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._on_save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.keys = list(checkpoint.get("state_dict") or ())
        self._on_load(checkpoint)


def weights(change: Callable[[str, Tensor], tuple[str, Any]]) -> Change:
    return lambda c: c.update(state_dict=dict(change(name, value) for name, value in c["state_dict"].items()))


def half(name: str, value: Tensor) -> tuple[str, Tensor]:
    return name, value.detach().half() if value.is_floating_point() else value


def swap(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["state_dict"]
    state["net.0.bias"], state["net.2.bias"] = state["net.2.bias"], state["net.0.bias"]


def add(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] |= {"more": torch.arange(3), "sparse": torch.eye(2).to_sparse(), "words": {"a": 1}}


def take_added(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["state_dict"]
    assert state.pop("more").tolist() == [0, 1, 2]
    assert state.pop("words") == {"a": 1}
    assert torch.equal(state.pop("sparse").to_dense(), torch.eye(2))


def move(checkpoint: dict[str, Any]) -> None:
    checkpoint["elsewhere"] = checkpoint.pop("state_dict")


def move_back(checkpoint: dict[str, Any]) -> None:
    assert "state_dict" not in checkpoint
    checkpoint["state_dict"] = checkpoint.pop("elsewhere")


def remove(checkpoint: dict[str, Any]) -> None:
    checkpoint["removed"] = {name: checkpoint["state_dict"].pop(name) for name in ("net.0.weight", "frozen.bias")}


def halve_moments(checkpoint: dict[str, Any]) -> None:
    for entry in checkpoint["optimizer_states"][0]["state"].values():
        entry["exp_avg"] = entry["exp_avg"] * 0.5


CHANGES: dict[str, tuple[Change, Change]] = {
    "nothing": (id, id),
    "copies": (weights(lambda name, value: (name, value.detach().clone())), id),
    "halves": (weights(half), id),
    "one of two tied": (lambda c: c["state_dict"].update({"net.0.weight": torch.full((8, 8), 0.25)}), id),
    "renamed": (weights(lambda n, v: ("x." + n, v)), weights(lambda n, v: (n[2:], v))),
    "exchanged": (swap, id),
    "added": (add, take_added),
    "removed": (remove, lambda c: c["state_dict"].update(c["removed"])),
    "another order": (lambda c: c.update(state_dict=dict(reversed(c["state_dict"].items()))), id),
    "moved": (move, move_back),
    "one level down": (
        lambda c: c.update(state_dict={"m": c["state_dict"]}),
        lambda c: c.update(state_dict=c["state_dict"]["m"]),
    ),
    "no moments": (lambda c: c["optimizer_states"][0].update(state={}), id),
    "half moments": (halve_moments, id),
    "another rate": (lambda c: c["optimizer_states"][0]["param_groups"][0].update(lr=0.5), id),
}


def run(
    folder: Path, make: Callable[[], Any], change: tuple[Change, Change], callbacks: Callable[[], Any] = list
) -> list[Any]:
    """Train, save, go on, test, export and go on from that under plain Lightning; everything that shows."""
    folder.mkdir()
    path, data = folder / "saved.ckpt", DataLoader(DATA, 4)

    def go(strategy: Any, steps: int, path: Path | None = None) -> tuple[Net, pl.Trainer]:
        pl.seed_everything(2 if path is None else 5, verbose=False)
        module, trainer = Net(*change), make_trainer(folder, strategy, max_steps=steps, callbacks=callbacks())
        trainer.fit(module, data, ckpt_path=None if path is None else str(path))
        return module, trainer

    first, trainer = go(make(), 4)
    trainer.save_checkpoint(path)
    rest, trainer = go(make(), 8, path)
    tested = Net(*change)
    make_trainer(folder, make()).test(tested, data, ckpt_path=str(path), verbose=False)
    paths = [path]
    if mark_of(str(path)) is not None:
        with CheckpointReader(path) as reader:
            reader.verify()
        consolidate(path, folder / "exported.ckpt")
        paths.append(folder / "exported.ckpt")
    plain, _ = go("auto", 8, path)
    for other in paths[1:]:
        again, _ = go("auto", 8, other)
        assert (again.losses, again.keys) == (plain.losses, plain.keys)
    values = {name: value.detach().clone() for name, value in rest.state_dict().items()}
    return [first.losses, rest.losses, rest.keys, tested.losses, plain.losses, plain.keys, values]


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    assert ours[:-1] == theirs[:-1]
    assert all(torch.equal(value, theirs[-1][name]) for name, value in ours[-1].items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_what_hooks_leave_is_saved(tmp_path: Path, change: str) -> None:
    ours = run(tmp_path / "ours", streamed, CHANGES[change])
    assert_same(ours, run(tmp_path / "plain", lambda: "auto", CHANGES[change]))


class Renaming(Net):
    """Has methods of its own for its state, that take what Lightning gives them and nothing more."""

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {f"own.{name}": value for name, value in super().state_dict().items()}

    def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
        return super().load_state_dict({name.removeprefix("own."): v for name, v in state.items()}, strict=strict)


def test_a_module_whose_state_dict_is_its_own(tmp_path: Path) -> None:
    def run(strategy: Callable[[], Any], name: str) -> list[Any]:
        pl.seed_everything(2, verbose=False)
        first, data = Renaming(), DataLoader(DATA, 4)
        trainer = make_trainer(tmp_path, strategy(), max_steps=4)
        trainer.fit(first, data)
        trainer.save_checkpoint(tmp_path / name)
        second = Renaming()
        make_trainer(tmp_path, strategy(), max_steps=8).fit(second, data, ckpt_path=str(tmp_path / name))
        return [first.losses, second.losses, second.keys, second.state_dict()]

    assert_same(run(streamed, "ours"), run(lambda: "auto", "plain"))


@pytest.mark.filterwarnings("ignore")
def test_averaged_weights_are_saved_beside_the_state_of_training(tmp_path: Path) -> None:
    def averaging() -> list[pl.Callback]:
        return [EMAWeightAveraging(decay=0.9)]

    ours = run(tmp_path / "ours", streamed, (id, id), averaging)
    assert_same(ours, run(tmp_path / "plain", lambda: "auto", (id, id), averaging))


def test_verify_finds_a_checkpoint_that_lacks_state(tmp_path: Path) -> None:
    """As they were saved once: every byte is right, the moments are not there, and the Trainer cannot go on."""
    trainer = make_trainer(tmp_path, streamed(), max_steps=1)
    trainer.fit(Net(), DataLoader(DATA, 4))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    path = tmp_path / "saved.ckpt.links" / MANIFEST
    text = path.read_bytes().replace(b'"kind":"exp_avg_sq"', b'"kind":"exp_avg_qs"')
    begin = text.index(b'"crc32c":"') + 10
    path.write_bytes(seal(text[:begin] + b"00000000" + text[begin + 8 :]))
    with CheckpointReader(path.parent) as reader, pytest.raises(CheckpointError, match="whose exp_avg_sq is not stor"):
        reader.verify()
    code = "import sys; from lightning_ssd.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "verify", path.parent], capture_output=True, text=True)
    assert done.returncode == 1
    assert "training cannot go on" in done.stderr
