"""Checkpoints under Lightning's own callbacks and loaders, between this strategy and plain Lightning."""

from __future__ import annotations

import errno
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.checkpoint.link_file import mark_of
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.convert.export import consolidate
from lightning_ssd.errors import CheckpointError
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, make_trainer


def streamed(**kwargs: Any) -> SSDOffloadStrategy:
    return SSDOffloadStrategy(**({"host_memory": "min", "min_unit_numel": 0, "update": "torch"} | kwargs))


class Rich(Module):
    """Hyper-parameters, a metric to monitor, a changed state dict and checkpoint hooks."""

    def __init__(self, width: int = 32, tie: bool = True) -> None:
        super().__init__(GPT(width=width, tie=tie))
        self.save_hyperparameters()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.notes: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        # Not monotonous, so that the best checkpoint is not the last one.
        self.log("val_loss", self.val_losses[-1] + 5.0 * (self.global_step > 6))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return {f"renamed.{name}": value for name, value in state.items()} | {"renamed.extra": ["not", "a tensor"]}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        own = {name.removeprefix("renamed."): v for name, v in state_dict.items() if name != "renamed.extra"}
        return super().load_state_dict(own, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["notes"] = {"step": self.global_step, "tensor": torch.arange(3)}
        self.notes.append(float(checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].abs().sum()))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.notes.append(checkpoint["notes"])


def loaders(num: int = 40) -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(Tokens(num), batch_size=4, shuffle=True), DataLoader(Tokens(8), batch_size=4)


def fit(
    tmp_path: Path, strategy: Any, module: pl.LightningModule | None = None, ckpt_path: Any = None, **kwargs: Any
) -> pl.Trainer:
    pl.seed_everything(3, verbose=False)
    module = module if module is not None else Rich()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in kwargs.get("callbacks", ()))
    options: dict[str, Any] = {"enable_checkpointing": saves, "max_steps": 12}
    trainer = make_trainer(tmp_path, strategy, **(options | kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, *loaders(), ckpt_path=ckpt_path)
    return trainer


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in nn.Module.state_dict(module).items()}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    assert not [name for name in x if not torch.equal(x[name], y[name])]


# ------------------------------------------------------------------------------------------------- ModelCheckpoint


@pytest.mark.parametrize("save_last", ["link", True])
def test_model_checkpoint_keeps_the_best(tmp_path: Path, save_last: str | bool) -> None:
    def run(name: str, strategy: Any) -> tuple[pl.Trainer, ModelCheckpoint]:
        callback = ModelCheckpoint(
            tmp_path / name, monitor="val_loss", save_top_k=2, save_last=save_last, filename="{step}"
        )
        return fit(tmp_path, strategy, callbacks=[callback], val_check_interval=2), callback

    (plain, plain_callback), (ours, our_callback) = run("plain", "auto"), run("ours", streamed())
    names = sorted(os.listdir(tmp_path / "ours"))
    files = [name for name in names if not name.endswith(".links")]
    assert files == sorted(os.listdir(tmp_path / "plain"))
    saved = [name for name in files if not (tmp_path / "ours" / name).is_symlink()]
    assert [name.removesuffix(".links") for name in names if name.endswith(".links")] == saved
    assert Path(our_callback.best_model_path).name == Path(plain_callback.best_model_path).name
    assert our_callback.best_model_score == plain_callback.best_model_score
    assert (tmp_path / "ours" / "last.ckpt").is_symlink() == (save_last == "link")
    assert mark_of(str(tmp_path / "ours" / "last.ckpt")) is not None
    for which in ("best", "last"):
        assert ours.test(dataloaders=loaders()[1], ckpt_path=which, verbose=False) == plain.test(
            dataloaders=loaders()[1], ckpt_path=which, verbose=False
        )


def test_weights_only_checkpoint_loads_weights(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, save_weights_only=True, filename="weights", every_n_train_steps=12)
    module = Module(GPT())
    fit(tmp_path, streamed(), module, callbacks=[callback])
    other = Module(GPT())
    trainer = make_trainer(tmp_path, streamed())
    trainer.validate(other, loaders()[1], ckpt_path=callback.best_model_path, verbose=False)
    assert_same(module, other)
    with pytest.raises(KeyError, match="save_weights_only"):
        fit(tmp_path, streamed(), Module(GPT()), ckpt_path=callback.best_model_path, max_steps=20)


def test_overwritten_in_place(tmp_path: Path) -> None:
    class Overwrites(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "same.ckpt")
            # A checkpoint is links to the live files, though hooks have looked at the state.
            files = list((tmp_path / "same.ckpt.links").rglob("units/*"))
            assert files
            assert all(file.stat().st_nlink == 2 for file in files)

    plain = fit(tmp_path, "auto", max_steps=16)
    fit(tmp_path, streamed(), callbacks=[Overwrites()], max_steps=8)
    assert sorted(os.listdir(tmp_path)) == [".ssd_offload", "same.ckpt", "same.ckpt.links"]
    ours = fit(tmp_path, streamed(), ckpt_path=tmp_path / "same.ckpt", max_steps=16)
    assert_same(plain.lightning_module, ours.lightning_module)


def test_a_run_whose_checkpoint_another_one_replaced_is_told(tmp_path: Path) -> None:
    trainer = fit(tmp_path, streamed(), max_steps=1)
    saved, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has been replaced")
        for path in (saved, saved, other):
            trainer.save_checkpoint(path)
    os.rename(saved, tmp_path / "c.ckpt")
    os.rename(other, saved)
    with pytest.warns(UserWarning, match=r"a\.ckpt' that this run saved has been replaced.*dirpath"):
        trainer.save_checkpoint(saved)


def test_files_at_rest_keep_an_honest_date_and_show_writes(tmp_path: Path) -> None:
    strategy = streamed(nvme_path=str(tmp_path / "store"))
    begin_s = time.time()
    trainer = fit(tmp_path, strategy, max_steps=1)
    param = next(iter(trainer.lightning_module.parameters()))
    before = param.detach().clone()
    files = list((tmp_path / "store").rglob("*.safetensors"))
    assert files
    assert all(begin_s - 5 < file.stat().st_mtime < time.time() + 5 for file in files)
    with torch.no_grad():
        param.fill_(0.5)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    with CheckpointReader(tmp_path / "c.ckpt") as reader:
        (name,) = (n for n, p in trainer.lightning_module.named_parameters() if p is param)
        assert (reader.value(name) == 0.5).all()
    assert not (before == 0.5).all()


def test_a_save_after_one_that_could_not_sync_links_nothing_doubtful(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the error of a save ends the run, and a callback saves once more."""
    sync, failed = os.fdatasync, list[int]()

    def fails_once(fd: int) -> None:
        if not failed and "param.safetensors" in os.readlink(f"/proc/self/fd/{fd}"):
            failed.append(os.fstat(fd).st_ino)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", fails_once)
    strategy = streamed(nvme_path=str(tmp_path / "store"))
    callbacks = [
        ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2),
        OnExceptionCheckpoint(tmp_path / "last"),
    ]
    monkeypatch.setattr(OnExceptionCheckpoint, "teardown", lambda *args: None)  # it removes what it saved
    with pytest.raises(CheckpointError, match="Input/output error"):
        fit(tmp_path, strategy, Module(GPT()), callbacks=callbacks)
    files = {path.stat().st_ino: path for path in (tmp_path / "last").rglob("units/*")}
    assert failed[0] not in files
    assert sum(path.stat().st_nlink == 1 for path in files.values()) == 1
    with CheckpointReader(tmp_path / "last" / "on_exception.ckpt") as reader:
        reader.verify()


# ------------------------------------------------------------------------------------- to and from plain Lightning


@pytest.mark.parametrize("accumulate", [1, 3])
def test_plain_checkpoint_goes_on_here(tmp_path: Path, accumulate: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    first = fit(tmp_path, "auto", max_steps=6, **options)
    first.save_checkpoint(tmp_path / "plain.ckpt")
    resumed = [
        fit(tmp_path, strategy, ckpt_path=tmp_path / "plain.ckpt", max_steps=16, **options)
        for strategy in ("auto", streamed())
    ]
    assert_same(*(trainer.lightning_module for trainer in resumed))


def test_our_checkpoint_goes_on_under_plain_lightning(tmp_path: Path) -> None:
    whole = fit(tmp_path, "auto", max_steps=20)
    callback = ModelCheckpoint(tmp_path, filename="ours", every_n_train_steps=10)
    fit(tmp_path, streamed(), callbacks=[callback], max_steps=10)
    consolidate(callback.best_model_path, tmp_path / "one-file.ckpt")
    resumed = fit(tmp_path, "auto", ckpt_path=tmp_path / "one-file.ckpt", max_steps=20)
    assert resumed.lightning_module.notes[0]["step"] == 10
    assert int(resumed.lightning_module.seen) == int(whole.lightning_module.seen) == 20
    ours = fit(tmp_path, streamed(), ckpt_path=callback.best_model_path, max_steps=20)
    assert_same(whole.lightning_module, ours.lightning_module)
    loaded = Rich.load_from_checkpoint(tmp_path / "one-file.ckpt")
    assert loaded.hparams == {"width": 32, "tie": True}
    assert torch.equal(loaded.notes[0]["tensor"], torch.arange(3))


def test_checkpoint_hooks_see_what_they_see_in_plain_lightning(tmp_path: Path) -> None:
    def run(strategy: Any) -> pl.Trainer:
        trainer = fit(tmp_path, strategy, max_steps=5)
        trainer.save_checkpoint(tmp_path / f"{type(trainer.strategy).__name__}.ckpt")
        return trainer

    assert run("auto").lightning_module.notes == run(streamed()).lightning_module.notes


def test_not_strict(tmp_path: Path) -> None:
    class Larger(Module):
        strict_loading = False

        def __init__(self) -> None:
            super().__init__(GPT())
            self.more = nn.Linear(4, 4)

    fit(tmp_path, streamed(), Module(GPT()), max_steps=3).save_checkpoint(tmp_path / "smaller.ckpt")
    saved = make_trainer(tmp_path, streamed())
    module = Larger()
    before = module.more.weight.detach().clone()
    saved.validate(module, loaders()[1], ckpt_path=tmp_path / "smaller.ckpt", verbose=False)
    assert torch.equal(module.more.weight, before)


# ------------------------------------------------------------------------------------------------------ open format


def test_store_files_open_by_parameter_name_while_training(tmp_path: Path) -> None:
    seen: set[tuple[str, str]] = set()

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
            shapes = {name: list(p.shape) for name, p in module.named_parameters()}
            for path in tmp_path.rglob("*.safetensors"):
                kind = path.name.split(".")[-2]
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118  not a dict
                        assert list(file.get_tensor(name).shape) == shapes[name]
                        seen.add((kind, name))

    trainer = fit(tmp_path, streamed(nvme_path=str(tmp_path / "store")), Module(GPT()), callbacks=[Reads()])
    names = {name for name, _ in trainer.lightning_module.named_parameters()}
    assert seen >= {(kind, name) for kind in ("param", "exp_avg", "exp_avg_sq") for name in names}
