"""The callback that writes traces: which steps are in them, what is refused, and what is said if training is short."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_ssd import SSDOffloadTrace
from lightning_ssd.errors import ConfigurationError
from lightning_ssd.trace.chrome import read_trace
from lightning_ssd.trace.recorder import Lane, Recording


class Module(pl.LightningModule):
    """Leaves a span of its own in each step, so that a trace tells which batches it saw."""

    fails_at = -1

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with self.trainer.strategy.session.trace.span(Lane.COPY, "batch", str(self.trainer.fit_loop.total_batch_idx)):
            if batch_idx == self.fails_at:
                raise KeyError("of the user")
            return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoOptimizers(Module):
    """Each batch raises the global step by two."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(self.other(batch), batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.net, self.other)]


def fit(
    tmp_path: Path, *callbacks: Any, module: Module | None = None, strategy: Any = "ssd_offload", **kwargs: Any
) -> None:
    options: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path)}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, callbacks=list(callbacks), **(options | kwargs)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?!SSDOffloadTrace)")
        trainer.fit(module or Module(), DataLoader(torch.randn(12, 4), batch_size=2))


def batches(recording: Recording) -> list[int]:
    return [int(span.what) for span in recording.spans if span.name == "batch"]


@pytest.mark.parametrize(
    ("arguments", "kwargs", "expected"),
    [
        ({}, {}, [2]),
        ({"first_step": 0}, {}, [0]),
        ({"first_step": 1, "num_steps": 3}, {}, [1, 2, 3]),
        ({"first_step": 1}, {"accumulate_grad_batches": 2}, [2, 3]),
        ({"first_step": 5, "num_steps": 2}, {"max_epochs": 2}, [5, 6]),
    ],
    ids=["typical", "first", "several", "accumulated", "over epochs"],
)
def test_the_steps_asked_for_are_traced(tmp_path: Path, arguments: Any, kwargs: Any, expected: list[int]) -> None:
    callback = SSDOffloadTrace(str(tmp_path / "new" / "trace.json"), **arguments)
    fit(tmp_path, callback, **kwargs)
    recording = read_trace(tmp_path / "new" / "trace.json")
    assert batches(recording) == expected
    assert recording.num_steps == arguments.get("num_steps", 1)
    assert all(0 <= span.begin_s <= span.end_s <= recording.end_s for span in recording.spans)


def test_a_step_of_several_optimizers_is_one(tmp_path: Path) -> None:
    fit(tmp_path, SSDOffloadTrace(str(tmp_path / "trace.json"), num_steps=2), module=TwoOptimizers())
    assert batches(read_trace(tmp_path / "trace.json")) == [2, 3]


def test_each_fit_is_traced(tmp_path: Path) -> None:
    callback = SSDOffloadTrace(str(tmp_path / "trace.json"))
    fit(tmp_path, callback)
    (tmp_path / "trace.json").unlink()
    fit(tmp_path, callback)
    assert batches(read_trace(tmp_path / "trace.json")) == [2]


def test_two_callbacks_trace_steps_of_their_own(tmp_path: Path) -> None:
    first, second = (SSDOffloadTrace(str(tmp_path / f"{step}.json"), first_step=step) for step in (1, 2))
    fit(tmp_path, first, second)
    assert [batches(read_trace(tmp_path / f"{step}.json")) for step in (1, 2)] == [[1], [2]]
    with pytest.raises(ConfigurationError, match="step 2 is being traced already"):
        fit(tmp_path, SSDOffloadTrace(str(tmp_path / "third.json"), first_step=1, num_steps=2), second)


def test_the_log_names_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.ssd_offload"):
        fit(tmp_path, SSDOffloadTrace(str(tmp_path / "trace.json")))
    (said,) = [record.getMessage() for record in caplog.records if "trace written" in record.getMessage()]
    assert said.startswith(f"trace written to {tmp_path / 'trace.json'}: ")


def test_gradients_do_not_become_visible(tmp_path: Path) -> None:
    """A callback that looked as if it watched gradients would change how training runs, and what is measured."""
    from lightning_ssd.step.grad_consumers import find_grad_consumer

    module = Module()
    fit(tmp_path, callback := SSDOffloadTrace(str(tmp_path / "trace.json")), module=module)
    module.trainer.callbacks = [callback]
    assert find_grad_consumer(module.trainer, module) is None


def test_training_that_is_too_short_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"ended after 6 step\(s\): of 1 step\(s\) from step 6 on, 0 were traced"):
        fit(tmp_path, SSDOffloadTrace(str(tmp_path / "none.json"), first_step=6))
    assert not (tmp_path / "none.json").exists()
    with pytest.warns(UserWarning, match=r"ended after 6 step\(s\): of 9 step\(s\) from step 4 on, 2 were traced"):
        fit(tmp_path, SSDOffloadTrace(str(tmp_path / "some.json"), first_step=4, num_steps=9))
    recording = read_trace(tmp_path / "some.json")
    assert (batches(recording), recording.num_steps) == ([4, 5], 2)


def test_a_step_that_fails_is_written_as_far_as_it_came(tmp_path: Path) -> None:
    module = Module()
    module.fails_at = 2
    with pytest.raises(KeyError):
        fit(tmp_path, SSDOffloadTrace(str(tmp_path / "trace.json"), first_step=1, num_steps=3), module=module)
    recording = read_trace(tmp_path / "trace.json")
    assert (batches(recording), recording.num_steps) == ([1, 2], 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"first_step": -1}, "first_step=-1 is no number of steps from 0"),
        ({"num_steps": 0}, "num_steps=0 is no number of steps from 1"),
        ({"num_steps": 1.5}, "num_steps=1.5"),
        ({"path": "{tmp}"}, "is a directory"),
        ({"path": "{tmp}/file/trace.json"}, "cannot be made: Not a directory|cannot be made: File exists"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_first_step(
    tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    (tmp_path / "file").touch()
    path = arguments.get("path", "{tmp}/trace.json").format(tmp=tmp_path)
    with pytest.raises(ConfigurationError, match=said):
        fit(tmp_path, SSDOffloadTrace(**arguments | {"path": path}))


def test_another_strategy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the Trainer has SingleDeviceStrategy: remove the callback"):
        fit(tmp_path, SSDOffloadTrace(str(tmp_path / "trace.json")), strategy="auto")


DRIVER = """
import importlib, json, os, warnings
warnings.simplefilter("ignore")
namespace, path = json.loads(os.environ["CASE"])
cli = importlib.import_module(namespace + ".cli")
boring = importlib.import_module(namespace + ".demos.boring_classes")
spec = {"class_path": "lightning_ssd.SSDOffloadTrace", "init_args": {"path": path, "first_step": 1}}
quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
args = ["fit", "--trainer.strategy=ssd_offload", "--trainer.devices=1", "--trainer.max_steps=2", "--trainer.callbacks="]
args[-1] += json.dumps([spec])
made = cli.LightningCLI(boring.BoringModel, args=args, trainer_defaults=quiet | {"default_root_dir": os.getcwd()})
(callback,) = [c for c in made.trainer.callbacks if type(c).__name__ == "SSDOffloadTrace"]
print("CLASS", type(callback).__module__, isinstance(callback, importlib.import_module(namespace).Callback))
"""


@pytest.mark.parametrize(
    ("namespace", "classes"),
    [("lightning.pytorch", "for_lightning"), ("pytorch_lightning", "for_pytorch_lightning")],
)
def test_a_configuration_file_can_name_it_in_both_namespaces(
    fresh_python: Callable[..., str], tmp_store: Path, namespace: str, classes: str
) -> None:
    path = tmp_store / "trace.json"
    case = json.dumps([namespace, str(path)])
    out = fresh_python(f"import os; os.chdir({str(tmp_store)!r})" + DRIVER, CASE=case)
    assert f"CLASS lightning_ssd.strategy.{classes} True" in out
    assert read_trace(path).num_steps == 1
