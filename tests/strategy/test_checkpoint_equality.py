"""What users do to checkpoints, saved and loaded by plain Lightning and by the strategy, in every direction.

Each pattern is saved by plain Lightning and by the strategy in both forms, and each of these is loaded by plain
Lightning and by the strategy. What comes of it (losses, weights, what hooks saw, the error) must be what plain
Lightning alone makes of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.training import make_trainer, streamed

DATA = [(torch.full((4,), float(n)), torch.tensor([float(n % 3)])) for n in range(8)]
Hook = Callable[["Net", dict[str, Any]], None]


class Net(pl.LightningModule):
    """Two layers, a buffer, and what a pattern changes."""

    optimizer: str = "AdamW"
    scheduler: bool = False
    on_save: Hook | None = None
    on_load: Hook | None = None
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()

    def __init__(self, width: int = 6, **changes: Any) -> None:
        super().__init__()
        vars(self).update(changes)
        self.save_hyperparameters("width")
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        for name in self.more:
            setattr(self, name, nn.Linear(4, 1))
        for name in self.less:
            del self.net[int(name)]
        self.register_buffer("count", torch.zeros(3))
        self.losses: list[float] = []
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.count += 1
        loss = ((self.net(x).sum(-1, keepdim=True) + sum(getattr(self, n)(x) for n in self.more) - y) ** 2).mean()
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(self.net(batch[0]).sum()))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        names = self.optimizer.split("+")
        params = list(self.parameters())
        parts = [params[i :: len(names)] for i in range(len(names))]
        made = [getattr(torch.optim, name)(part, lr=0.05) for name, part in zip(names, parts, strict=True)]
        if len(made) > 1:
            self.automatic_optimization = False
        if self.scheduler:
            return [made[0]], [{"scheduler": torch.optim.lr_scheduler.StepLR(made[0], 2), "interval": "step"}]
        return made[0] if len(made) == 1 else made

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.on_save is not None:
            self.on_save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen.append(sorted(key for key in checkpoint if not key.startswith("ssd_offload")))
        self.seen.append(list(checkpoint.get("state_dict", ())))
        if self.on_load is not None:
            self.on_load(self, checkpoint)


class Counts(pl.Callback):
    """Has state."""

    def __init__(self, key: str = "counts") -> None:
        self._key = key
        self.num = 0
        self.average = torch.zeros(2)

    @property
    def state_key(self) -> str:
        return self._key

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.num += 1
        self.average += 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"num": self.num, "average": self.average.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num, self.average = state["num"], state["average"].clone()


@dataclass
class Pattern:
    """One way to use a checkpoint.

    Attributes:
        save: What is changed in the module that saves.
        load: What is changed in the module that loads.
        save_callbacks: Makes the callbacks of the run that saves; so does the next for the other.
        load_callbacks: Default: the same.
        how: ``fit``, ``validate``, ``test`` with ``ckpt_path``, or ``load_from_checkpoint``.
        weights_only: The save has weights alone.
        options: Of the call that loads.
    """

    save: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    save_callbacks: Callable[[], list[pl.Callback]] = list
    load_callbacks: Callable[[], list[pl.Callback]] = list
    how: str = "fit"
    weights_only: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _add(module: Net, checkpoint: dict[str, Any]) -> None:
    checkpoint["mine"] = {"tensor": torch.arange(5.0), "list": [1, "a"], "step": module.global_step}


def _add_weight(module: Net, checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["extra.weight"] = torch.ones(3, 2, dtype=torch.float16)


def _replace_weight(module: Net, checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["net.0.weight"] = torch.full((6, 4), 0.25)


def _scale_weights(module: Net, checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = {k: v.detach().clone() * 2 for k, v in checkpoint["state_dict"].items()}


def _delete_weight(module: Net, checkpoint: dict[str, Any]) -> None:
    del checkpoint["state_dict"]["net.2.bias"]


def _delete_optimizer(module: Net, checkpoint: dict[str, Any]) -> None:
    checkpoint.pop("optimizer_states", None)


def _change_optimizer(module: Net, checkpoint: dict[str, Any]) -> None:
    state = checkpoint["optimizer_states"][0]["state"]
    for entry in state.values():
        entry["exp_avg"] = torch.full_like(entry["exp_avg"], 0.125)


def _delete_loops(module: Net, checkpoint: dict[str, Any]) -> None:
    checkpoint.pop("loops", None)


def _rename(module: Net, checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = {f"old.{k}": v for k, v in checkpoint["state_dict"].items()}


def _rename_back(module: Net, checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = {k.removeprefix("old."): v for k, v in checkpoint["state_dict"].items()}


def _read(module: Net, checkpoint: dict[str, Any]) -> None:
    mine = checkpoint["mine"]
    module.seen.append((mine["tensor"].tolist(), mine["list"], mine["step"]))


def _halve(module: Net, checkpoint: dict[str, Any]) -> None:
    for value in checkpoint["state_dict"].values():
        value.mul_(0.5)  # in place: of a mapped tensor, in a copy of its page


def _counts(*keys: str) -> Callable[[], list[pl.Callback]]:
    return lambda: [Counts(key) for key in keys]


PATTERNS: dict[str, Pattern] = {
    "nothing": Pattern(),
    "scheduler": Pattern({"scheduler": True}, {"scheduler": True}),
    "scheduler is new": Pattern({}, {"scheduler": True}),
    "scheduler is gone": Pattern({"scheduler": True}, {}),
    "another optimizer": Pattern({}, {"optimizer": "SGD"}),
    "another optimizer, from SGD": Pattern({"optimizer": "SGD"}, {}),
    "two optimizers": Pattern({}, {"optimizer": "SGD+Adam"}),
    "one of two optimizers": Pattern({"optimizer": "SGD+SGD"}, {"optimizer": "SGD"}),
    "more parameters": Pattern({}, {"more": ("head",)}),
    "fewer parameters": Pattern({"more": ("head",)}, {}),
    "more parameters, not strict": Pattern({}, {"more": ("head",), "strict_loading": False}, how="validate"),
    "fewer parameters, not strict": Pattern({"more": ("head",)}, {"strict_loading": False}, how="validate"),
    "another shape": Pattern({}, {"width": 7}),
    "callback": Pattern(save_callbacks=_counts("a"), load_callbacks=_counts("a")),
    "callback is new": Pattern(load_callbacks=_counts("a")),
    "callback is gone": Pattern(save_callbacks=_counts("a")),
    "other callbacks": Pattern(save_callbacks=_counts("a", "b"), load_callbacks=_counts("c", "b")),
    "weights only, then fit": Pattern(weights_only=True),
    "weights only, then test": Pattern(weights_only=True, how="test"),
    "weights only, loaded": Pattern(weights_only=True, how="load_from_checkpoint"),
    "validated": Pattern(how="validate"),
    "loaded": Pattern(how="load_from_checkpoint"),
    "loaded with another width": Pattern(how="load_from_checkpoint", options={"width": 7}),
    "loaded with more": Pattern(how="load_from_checkpoint", load={"more": ("head",)}),
    "loaded with more, not strict": Pattern(
        how="load_from_checkpoint", load={"more": ("head",)}, options={"strict": False}
    ),
    "loaded with fewer, not strict": Pattern(
        {"more": ("head",)}, how="load_from_checkpoint", options={"strict": False}
    ),
    "entry added": Pattern({"on_save": _add}, {"on_load": _read}),
    "entry missing": Pattern({}, {"on_load": _read}),
    "tensor added": Pattern({"on_save": _add_weight}, {}),
    "tensor added, not strict": Pattern({"on_save": _add_weight}, {"strict_loading": False}),
    "tensor replaced": Pattern({"on_save": _replace_weight}, {}),
    "tensors replaced": Pattern({"on_save": _scale_weights}, {}),
    "tensor deleted": Pattern({"on_save": _delete_weight}, {}),
    "tensor deleted, not strict": Pattern({"on_save": _delete_weight}, {"strict_loading": False}),
    "renamed": Pattern({"on_save": _rename}, {"on_load": _rename_back}),
    "renamed at loading": Pattern({"on_save": _rename}, {"on_load": _rename_back}, how="load_from_checkpoint"),
    "changed at loading": Pattern({}, {"on_load": _halve}),
    "deleted at loading": Pattern({}, {"on_load": _delete_weight}),
    "optimizer deleted": Pattern({"on_save": _delete_optimizer}, {}),
    "optimizer changed": Pattern({"on_save": _change_optimizer}, {}),
    "loops deleted": Pattern({"on_save": _delete_loops}, {}),
}
FORMS = ("plain", "file", "links")
SHORT = (
    "nothing",
    "more parameters, not strict",
    "other callbacks",
    "weights only, then fit",
    "renamed",
    "loaded with more",
)


def strategy(form: str) -> Any:
    return "auto" if form == "plain" else streamed(checkpoint=form)


def save(folder: Path, form: str, pattern: Pattern) -> Path:
    pl.seed_everything(7, verbose=False)
    # At the end of an epoch: in the middle of one, or after fit, plain Lightning does not go on as if never stopped.
    saver = ModelCheckpoint(folder, form, save_on_train_epoch_end=True, save_weights_only=pattern.weights_only)
    callbacks = [*pattern.save_callbacks(), saver]
    trainer = make_trainer(folder, strategy(form), max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(Net(**pattern.save), DataLoader(DATA, batch_size=2))
    return folder / f"{form}.ckpt"


def outcome(folder: Path, form: str, path: Path, pattern: Pattern) -> dict[str, Any]:
    """What a run finds that loads the checkpoint."""
    pl.seed_everything(8, verbose=False)
    callbacks = pattern.load_callbacks()
    module = Net(**pattern.load)
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            if pattern.how == "load_from_checkpoint":
                module = Net.load_from_checkpoint(path, weights_only=False, **pattern.options, **pattern.load)
            else:
                trainer = make_trainer(folder, strategy(form), max_epochs=2, callbacks=callbacks)
                run = getattr(trainer, pattern.how)
                loader = DataLoader(DATA, batch_size=2)
                options = {} if pattern.how == "fit" else {"verbose": False}
                run(module, loader, ckpt_path=str(path), **options)
                found["step"] = trainer.global_step
        except Exception as error:
            found["error"] = error
    found["losses"], found["seen"] = module.losses, module.seen
    found["callbacks"] = [(each.num, each.average.tolist()) for each in callbacks if isinstance(each, Counts)]
    found["warnings"] = {str(each.message).replace(str(path), "PATH") for each in told if _matters(each)}
    if "error" not in found:
        found["weights"] = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return found


def _matters(warning: warnings.WarningMessage) -> bool:
    """About the checkpoint, not about the settings of the test; loaders are resumable here."""
    if "not resumable" in str(warning.message):
        return False
    words = ("checkpoint", "state", "key", "callback", "optimizer")
    return issubclass(warning.category, UserWarning) and any(word in str(warning.message).lower() for word in words)


def assert_equal(ours: dict[str, Any], plain: dict[str, Any], where: str) -> None:
    expected, error = plain.pop("error", None), ours.pop("error", None)
    assert (error is None) == (expected is None), f"{where}: {error!r} instead of {expected!r}"
    if expected is not None:
        assert isinstance(error, type(expected)), f"{where}: {error!r} instead of {expected!r}"
        return
    weights, other = ours.pop("weights"), plain.pop("weights")
    assert list(weights) == list(other), where
    different = [name for name, value in weights.items() if not torch.equal(value, other[name])]
    assert not different, f"{where}: {different}"
    missing = plain.pop("warnings") - ours.pop("warnings")
    assert not missing, f"{where}: {missing}"
    assert ours == plain, where


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in PATTERNS]
)
def test_every_direction_gives_what_plain_lightning_gives(tmp_path: Path, name: str) -> None:
    pattern = PATTERNS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = {form: save(tmp_path, form, pattern) for form in FORMS}
    for saved, path in paths.items():
        for loading in FORMS[:2] if pattern.how != "load_from_checkpoint" else FORMS[:1]:
            if (saved, loading) != ("plain", "plain"):
                expected = outcome(tmp_path, "plain", paths["plain"], pattern)
                found = outcome(tmp_path, loading, path, pattern)
                assert_equal(found, expected, f"{name}: saved by {saved}, loaded by {loading}")
