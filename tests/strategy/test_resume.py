"""A run that stops after step 20 and goes on in another process ends as the run that never stopped, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.session.handover import masters_of
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.conftest import REPOSITORY
from tests.helpers.models import GPT
from tests.helpers.resuming import END, SCENARIOS, STOP, make_net, make_strategy, run
from tests.helpers.training import Module, Tokens, adamw, assert_equal, make_trainer, train

Weights = dict[str, Tensor]


def small(**options: Any) -> SSDOffloadStrategy:
    return SSDOffloadStrategy(**({"host_memory": "min", "min_unit_numel": 0, "update": "torch"} | options))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """Final weights of every scenario, after a stop; one process goes on with all of them."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("resume")
    for name in SCENARIOS:
        run(directory, name, make_strategy(name, resumed=False), max_steps=STOP)
    command = [sys.executable, "-m", "tests.helpers.resuming", str(directory)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return {name: torch.load(directory / f"{name}.ckpt.pt") for name in SCENARIOS}


@pytest.mark.not_simulated(reason="the second process is on the CPU")
@pytest.mark.parametrize("name", SCENARIOS)
def test_resumed_is_uninterrupted(tmp_path: Path, resumed: dict[str, Weights], name: str) -> None:
    scenario = SCENARIOS[name]
    has_other_arithmetic = "update" in scenario.strategy or "precision" in scenario.trainer
    strategy = make_strategy(name, resumed=False) if has_other_arithmetic else "auto"  # plain Lightning
    expected = run(tmp_path, name, strategy, max_steps=END)
    assert not [key for key, value in expected.items() if not torch.equal(value, resumed[name][key])]


def test_data_that_is_not_there_any_more_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, "mid-epoch", make_strategy("mid-epoch", resumed=False), max_steps=STOP)
    trainer = make_trainer(tmp_path, make_strategy("mid-epoch", resumed=True), max_steps=END)
    module = Module(make_net())
    with pytest.raises(CheckpointError, match="after 7 batches of an epoch, the training data loader has only 3"):
        trainer.fit(module, DataLoader(Tokens(12), batch_size=4), ckpt_path=str(tmp_path / "mid-epoch.ckpt"))


def _reversed_adamw(module: nn.Module) -> torch.optim.Optimizer:
    """The groups of `adamw`, their parameters from last to first."""
    optimizer = adamw(module)
    for group in optimizer.param_groups:
        group["params"].reverse()
    return optimizer


def _saved(tmp_path: Path, **kwargs: Any) -> Path:
    result = train(tmp_path, GPT, small(), max_steps=3, **kwargs)
    result.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


def test_optimizer_state_is_found_by_name(tmp_path: Path) -> None:
    """Most parameters of a group have the shape of others in it: by place they would be exchanged without a word."""
    saved = str(_saved(tmp_path))
    resumed = [
        train(tmp_path, GPT, small(), optimizer=optimizer, max_steps=6, ckpt_path=saved)
        for optimizer in (adamw, _reversed_adamw)
    ]
    assert_equal(*resumed)
    states = [result.trainer.optimizers[0].state_dict()["state"] for result in resumed]
    names = [name for name, p in resumed[0].module.named_parameters() if p.dim() > 1]
    for number in range(len(names)):
        assert torch.equal(states[0][number]["exp_avg"], states[1][len(names) - 1 - number]["exp_avg"])


def test_parameters_in_another_group_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(module: nn.Module) -> torch.optim.Optimizer:
        optimizer = adamw(module)
        optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
        return optimizer

    saved = str(_saved(tmp_path))
    monkeypatch.setattr(warnings, "simplefilter", lambda *args: None)  # `train` is silent otherwise
    with pytest.warns(
        UserWarning, match=r"AdamW has other parameters .*group 1: 'net.head.weight' were in another group"
    ):
        result = train(tmp_path, GPT, small(), optimizer=moved, max_steps=3, ckpt_path=saved)
    with CheckpointReader(saved) as reader:
        expected = reader.tensor("net.head.weight", "exp_avg")
        last = len(result.trainer.optimizers[0].state_dict()["state"]) - 1
        assert torch.equal(result.trainer.optimizers[0].state_dict()["state"][last]["exp_avg"], expected)


def test_parameters_that_do_not_match_are_named(tmp_path: Path) -> None:
    def fewer(module: nn.Module) -> torch.optim.Optimizer:
        optimizer = adamw(module)
        optimizer.param_groups[0]["params"].pop()
        return optimizer

    with pytest.raises(
        CheckpointError, match=r"AdamW, group 0: .*'net.head.weight' of the checkpoint are not .*--like"
    ):
        train(tmp_path, GPT, small(), optimizer=fewer, max_steps=6, ckpt_path=str(_saved(tmp_path)))


def test_a_plain_checkpoint_in_another_order_is_refused_where_shapes_tell(tmp_path: Path) -> None:
    plain = train(tmp_path, GPT, "auto", max_steps=3)
    plain.trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match=r"'exp_avg' of 'net\..*' has shape \(.*another order"):
        train(
            tmp_path,
            GPT,
            small(update="auto"),
            optimizer=_reversed_adamw,
            max_steps=6,
            ckpt_path=str(tmp_path / "plain.ckpt"),
        )


# ------------------------------------------------------------------------------------------------- the resumed side

OTHER_SIDES: dict[str, dict[str, Any]] = {
    "everything in memory": {"host_memory": "512MiB"},
    "in memory, recomputing": {"host_memory": "512MiB", "activations": "recompute"},
    "one unit": {"units": ["GPT"]},
    "a unit for each Linear": {"units": ["Linear", "Embedding"], "window": 2},
    "small leftovers together": {"min_unit_numel": 1_000_000, "overlap": "off"},
    "two disks": {"nvme_path": ["a", "b"]},
    "posix": {"io": IOOptions(engine="posix"), "verify_reads": False},
    "python, buffered": {"io": IOOptions(engine="python", direct="off")},
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_checkpoint_resumes_anywhere(tmp_path: Path, precision: str) -> None:
    """Budget, cut, disks and engine are no part of a checkpoint: whatever they are now, the bits are the same."""
    options: dict[str, Any] = {"precision": precision}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    both = {"callbacks": [saver], "enable_checkpointing": True}
    whole = train(tmp_path, GPT, small(update="auto"), max_steps=6, **options, **both)
    for name, settings in OTHER_SIDES.items():
        folder = tmp_path / name
        paths = [str(folder / path) for path in settings.get("nvme_path", ["a"])]
        strategy = small(**({"update": "auto"} | settings | {"nvme_path": paths}))
        rest = train(folder, GPT, strategy, max_steps=6, ckpt_path=str(tmp_path / "step=3.ckpt"), **options)
        assert rest.losses == whole.losses[3:], name
        rest.losses = whole.losses
        assert_equal(whole, rest)
        if len(paths) == 2:
            used = {os.path.dirname(g.file.path) for g in strategy.session.store._current.values()}
            assert len(used) == 2


@pytest.mark.parametrize(("saved", "resumed"), [("bf16-true", "32-true"), ("32-true", "bf16-true")])
def test_a_checkpoint_resumes_in_another_precision(tmp_path: Path, saved: str, resumed: str) -> None:
    """Nothing is rounded on the way: what is updated is the float32 that was saved. The steps then round otherwise."""
    first = train(tmp_path, GPT, small(update="auto"), max_steps=3, precision=saved)
    first.trainer.save_checkpoint(tmp_path / "saved.ckpt")

    class Looks(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            session = trainer.strategy.session
            masters = masters_of(session)
            with CheckpointReader(tmp_path / "saved.ckpt") as reader:
                for name, param in module.named_parameters():
                    kind = "master" if saved == "bf16-true" else "param"
                    expected = reader.tensor(name, kind)
                    found = param.detach() if resumed == "32-true" else masters[param]
                    assert found.dtype == expected.dtype == torch.float32
                    assert torch.equal(found, expected), name
                    assert torch.equal(param.detach().to(torch.bfloat16), expected.to(torch.bfloat16))
                    seen.append(name)

    seen: list[str] = []
    options: dict[str, Any] = {"max_steps": 6, "ckpt_path": str(tmp_path / "saved.ckpt")}
    rest = train(tmp_path, GPT, small(update="auto"), precision=resumed, callbacks=[Looks()], **options)
    assert seen
    same = train(tmp_path, GPT, small(update="auto"), precision=saved, **options)
    assert rest.losses == pytest.approx(same.losses, rel=2**-6)  # bfloat16 has 8 bits, and three steps add little
