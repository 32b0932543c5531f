"""What Lightning allows around a run, and what users put in the place of its parts."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.helpers.training import Module, Tokens, make_trainer

DATA = DataLoader(Tokens(16), batch_size=4)


def small() -> Module:
    torch.manual_seed(0)
    return Module(nn.Sequential(nn.Embedding(97, 8), nn.Linear(8, 97)))


def streamed(**kwargs: Any) -> SSDOffloadStrategy:
    return SSDOffloadStrategy(**({"host_memory": "min", "min_unit_numel": 0, "checkpoint": "file"} | kwargs))


def both(tmp_path: Path, use: Callable[[pl.Trainer, Module], Any], **options: Any) -> tuple[Any, Any]:
    """What ``use`` returns with plain Lightning, and with the strategy."""
    found = []
    for strategy in ("auto", streamed()):
        pl.seed_everything(3, verbose=False)
        found.append(use(make_trainer(tmp_path, strategy, **({"max_steps": 4} | options)), small()))
    return found[0], found[1]


# ------------------------------------------------------------------------------------------------- checkpoint plugins


class OwnFormat(TorchCheckpointIO):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.asked.append(("save", Path(path).name, storage_options))
        Path(path).parent.mkdir(exist_ok=True)
        torch.save({"mine": checkpoint}, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.asked.append(("load", Path(path).name))
        content: dict[str, Any] = torch.load(path, weights_only=False)["mine"]
        return content

    def remove_checkpoint(self, path: Any) -> None:
        self.asked.append(("remove", Path(path).name))
        super().remove_checkpoint(path)


@pytest.mark.compatibility("Checkpoints", "a CheckpointIO plugin, with storage_options")
def test_a_plugin_saves_loads_and_removes(tmp_path: Path) -> None:
    results = []
    for name, strategy in (("plain", "auto"), ("ours", streamed(checkpoint="auto"))):
        plugin, saver = OwnFormat(), ModelCheckpoint(tmp_path / name, every_n_train_steps=2, save_top_k=1)
        options: dict[str, Any] = {"plugins": [plugin], "enable_checkpointing": True}
        trainer = make_trainer(tmp_path, strategy, max_steps=4, callbacks=[saver], **options)
        trainer.fit(small(), DATA)
        trainer.save_checkpoint(tmp_path / name / "x.ckpt", storage_options={"a": 1})
        module = small()
        again = make_trainer(tmp_path, "auto" if name == "plain" else streamed(), max_steps=6, plugins=[plugin])
        again.fit(module, DATA, ckpt_path=str(tmp_path / name / "x.ckpt"))
        results.append((plugin.asked, len(module.losses)))
    assert results[0] == results[1]
    weights = [torch.load(tmp_path / name / "x.ckpt", weights_only=False)["mine"] for name in ("plain", "ours")]
    assert all(torch.equal(weights[0]["state_dict"][key], value) for key, value in weights[1]["state_dict"].items())


@pytest.mark.compatibility("Checkpoints", "URLs of fsspec")
def test_a_url_goes_to_the_plugin(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, streamed(), max_steps=4)
    trainer.fit(small(), DATA)
    losses = []
    for path in (f"{tmp_path}/x.ckpt", "memory://surface/x.ckpt"):
        trainer.save_checkpoint(path)
        resumed = small()
        make_trainer(tmp_path, streamed(), max_steps=6).fit(resumed, DATA, ckpt_path=path)
        losses.append(resumed.losses)
        trainer.strategy.remove_checkpoint(path)
    assert losses[0] == losses[1]
    assert not (tmp_path / "x.ckpt").exists()


@pytest.mark.parametrize("plugin", [TorchCheckpointIO(), None])
def test_lightnings_own_plugin_changes_nothing(tmp_path: Path, plugin: Any) -> None:
    options = {} if plugin is None else {"plugins": [plugin]}
    trainer = make_trainer(tmp_path, streamed(), max_steps=2, **options)
    trainer.fit(small(), DATA)
    assert trainer.strategy.checkpoint_io is plugin or plugin is None  # asking for it makes it
    with mock.patch("lightning.fabric.plugins.io.torch_io._atomic_save", side_effect=AssertionError("in memory")):
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    trainer.validate(small(), DATA, ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)


def test_what_replaces_the_stock_functions_is_called(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, streamed(), max_steps=2)
    trainer.fit(small(), DATA)
    with mock.patch.object(TorchCheckpointIO, "save_checkpoint") as save:
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    save.assert_called_once_with(mock.ANY, tmp_path / "x.ckpt", storage_options=None)
    with mock.patch("torch.save") as save:
        trainer.save_checkpoint(tmp_path / "y.ckpt")
    assert save.call_count == 1


@pytest.mark.compatibility("Checkpoints", "AsyncCheckpointIO")
def test_asynchronous_saves_are_complete_after_the_run(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"plugins": [AsyncCheckpointIO()], "callbacks": [saver], "enable_checkpointing": True}
    make_trainer(tmp_path, streamed(), max_steps=4, **options).fit(small(), DATA)
    assert sorted(torch.load(path, weights_only=False)["global_step"] for path in tmp_path.glob("*.ckpt")) == [2, 4]


@pytest.mark.parametrize(
    ("use", "named"),
    [
        (lambda t, path: t.save_checkpoint("memory://surface/y.ckpt"), "the URL memory://surface/y.ckpt"),
        (lambda t, path: t.save_checkpoint(path / "y.ckpt", storage_options=1), "storage_options"),
    ],
)
def test_links_are_refused_where_none_can_be(tmp_path: Path, use: Callable[..., None], named: str) -> None:
    trainer = make_trainer(tmp_path, streamed(checkpoint="links"), max_steps=2)
    trainer.fit(small(), DATA)
    with pytest.raises(ConfigurationError, match=f"checkpoint='links' .* {named} .* use checkpoint='file'"):
        use(trainer, tmp_path)


# --------------------------------------------------------------------------------------------------- around the run


@pytest.mark.compatibility("Checkpoints", "a save before a run")
def test_a_save_before_a_run(tmp_path: Path) -> None:
    def use(trainer: pl.Trainer, module: Module) -> Any:
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        return torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]

    plain, ours = both(tmp_path, use)
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[key], ours[key]) for key in plain)


@pytest.mark.compatibility("Loops", "a step of a loop that is called after the run")
def test_a_step_after_the_run(tmp_path: Path) -> None:
    def use(trainer: pl.Trainer, module: Module) -> Any:
        trainer.fit(module, DATA)
        batch = next(iter(DATA))
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        loop.run(trainer.optimizers[0], 0, {"batch": batch, "batch_idx": 0})
        trainer.strategy.validation_step(batch, 0)
        return module.losses, module.val_losses

    plain, ours = both(tmp_path, use)
    assert plain == ours


class Nothing(pl.LightningModule):
    """It has no parameters."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        first: Tensor = batch[0]
        return first.sum()

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
@pytest.mark.compatibility("LightningModule", "no parameters: fit and predict")
def test_a_model_without_parameters(tmp_path: Path) -> None:
    found = []
    for strategy in ("auto", streamed()):
        trainer = make_trainer(tmp_path, strategy, max_steps=2)
        trainer.fit(Nothing(), DATA)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        found.append((trainer.predict(Nothing(), DATA), torch.load(tmp_path / "x.ckpt", weights_only=True)["epoch"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.compatibility("Trainer", "deepcopy and pickle, then fit")
def test_copies_of_a_trainer(tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    def use(trainer: pl.Trainer, module: Module) -> Any:
        trainer.fit(module, DATA)
        twin = copied(trainer)
        twin.fit_loop.epoch_loop.max_steps = 6
        other = twin.lightning_module
        twin.fit(other, DATA)
        return module.losses, other.losses

    plain, ours = both(tmp_path, use)
    assert plain == ours


@pytest.mark.compatibility("Trainer", "one strategy object in several Trainers")
def test_one_strategy_object_in_several_trainers(tmp_path: Path) -> None:
    """As a package does that makes each of its Trainers from the same arguments; each has its own precision."""
    results, plugin = [], OwnFormat()
    for strategy in (None, streamed(update="torch")):
        module = small()
        for precision in ("bf16-mixed", "32-true"):
            options: dict[str, Any] = {"strategy": strategy or "auto", "precision": precision, "plugins": [plugin]}
            trainer = make_trainer(tmp_path, max_steps=4, **options)
            assert (trainer.precision, trainer.strategy.checkpoint_io) == (precision, plugin)
            trainer.fit(module, DATA)
            predictor = make_trainer(tmp_path, **options)
            predictions = predictor.predict(module, DATA)
            trainer.validate(module, DATA, verbose=False)  # the first Trainer again
        results.append((module.losses, module.val_losses, torch.cat(predictions), *module.state_dict().values()))
    for plain, ours in zip(*results, strict=True):
        assert torch.equal(torch.as_tensor(plain), torch.as_tensor(ours))


@pytest.mark.compatibility("LightningModule", "torch.save(module) in a run")
def test_a_model_saved_whole_in_its_run(tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Module, *args: Any) -> None:
            torch.save(module.net, self.file)

    saves = Saves()

    def use(trainer: pl.Trainer, module: Module) -> Any:
        saves.file = io.BytesIO()
        trainer.fit(module, DATA)
        saves.file.seek(0)
        return torch.load(saves.file, weights_only=False)(next(iter(DATA))[0])

    plain, ours = both(tmp_path, use, callbacks=[saves], max_steps=1)
    assert torch.equal(plain, ours)


# -------------------------------------------------------------------------------------------------- steps of optimizers


class StepsItself(Module):
    def __init__(self) -> None:
        super().__init__(small().net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.compatibility("Optimizers", "a step that is mocked on the class")
def test_a_step_replaced_on_the_class_is_called_as_often(tmp_path: Path) -> None:
    def use(trainer: pl.Trainer, _: Module) -> Any:
        module = StepsItself()
        with mock.patch.multiple(torch.optim.AdamW, step=mock.DEFAULT, zero_grad=mock.DEFAULT) as replaced:
            trainer.fit(module, DATA)
        return {name: each.call_count for name, each in replaced.items()}, module.losses

    plain, ours = both(tmp_path, use)
    assert plain[0]["step"] == ours[0]["step"] == 4


@pytest.mark.compatibility("Trainer", "a mock around Strategy.backward")
def test_backward_of_the_strategy_can_be_counted(tmp_path: Path) -> None:
    def use(trainer: pl.Trainer, module: Module) -> Any:
        strategy = trainer.strategy
        with mock.patch.object(pl.strategies.Strategy, "backward", wraps=strategy.backward) as counted:
            trainer.fit(module, DATA)
            assert strategy.backward is counted
        return counted.call_count, module.losses

    plain, ours = both(tmp_path, use)
    assert plain == ours


class ReplacesStep(pl.Callback):
    """Puts a function in the place of the optimizer's step."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.num_steps = 0
        step = trainer.optimizers[0].step

        def counted(closure: Any = None) -> Any:
            self.num_steps += 1
            return step(closure) if self.num_steps % 2 else closure()

        trainer.optimizers[0].step = counted  # type: ignore[method-assign]


@pytest.mark.compatibility("Optimizers", "a step that is wrapped on the object")
def test_a_step_replaced_in_the_run(tmp_path: Path) -> None:
    def use(trainer: pl.Trainer, module: Module) -> Any:
        trainer.fit(module, DATA)
        return module.losses

    plain, ours = both(tmp_path, use, callbacks=[ReplacesStep()])
    assert plain == ours


class Forgets(torch.optim.SGD):
    """Does not evaluate the closure."""

    def step(self, closure: Any = None) -> Any:
        return super().step()


@pytest.mark.compatibility("Optimizers", "a step that does not call its closure: Lightning's error")
def test_a_step_that_forgets_the_closure_fails_as_with_plain_lightning(tmp_path: Path) -> None:
    def use(trainer: pl.Trainer, module: Module) -> Any:
        module._make_optimizer = lambda m: Forgets(m.parameters(), 0.1)
        with pytest.raises(pl.utilities.exceptions.MisconfigurationException) as raised:
            trainer.fit(module, DATA)
        return str(raised.value)

    plain, ours = both(tmp_path, use)
    assert plain == ours
    assert "The closure hasn't been executed" in ours
