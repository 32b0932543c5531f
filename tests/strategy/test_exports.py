"""Exports in the middle of a fit hold the weights of that moment, or are refused with the way out."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd import gathered
from lightning_ssd.errors import ResidencyError
from tests.helpers.training import Module, make_trainer, streamed

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(5))


class Net(Module):
    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))), schedule=False
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch).square().mean()


def saved(net: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def exported(net: nn.Module) -> Any:
    return torch.export.export(net, (X,)).module()


def exported_under_gathered(net: nn.Module) -> Any:
    with gathered(net):
        return exported(net)


def traced(net: nn.Module) -> Any:
    return torch.jit.trace(net, X)


class Export(Callback):
    """After a step: exports, and what plain values of that moment give."""

    def __init__(self, export: Callable[[nn.Module], Any]) -> None:
        self._export = export
        self.outputs: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if not self.outputs:
            self.exported = self._export(module.net)
            plain = Net()
            plain.load_state_dict({name: value.detach().clone() for name, value in module.state_dict().items()})
            self.outputs = [plain.net(X).detach(), self.exported(X).detach()]
            self.plain = plain


def run(tmp_path: Path, export: Callable[[nn.Module], Any], memory: str) -> Export:
    torch.manual_seed(0)
    callback = Export(export)
    trainer = make_trainer(tmp_path, streamed(host_memory=memory), max_steps=3, callbacks=[callback])
    trainer.fit(Net(), DataLoader(torch.randn(12, 16), batch_size=4))  # type: ignore[arg-type]
    return callback


COPIES: list[Callable[[nn.Module], Any]] = [
    saved,
    copy.deepcopy,
    lambda net: pickle.loads(pickle.dumps(net)),
    lambda net: torch.jit.trace(copy.deepcopy(net), X),
]


@pytest.mark.parametrize("memory", ["min", "256MiB"])
@pytest.mark.parametrize("export", COPIES)
def test_a_copy_keeps_the_values_of_its_moment(tmp_path: Path, export: Any, memory: str) -> None:
    callback = run(tmp_path, export, memory)
    torch.testing.assert_close(callback.outputs[1], callback.outputs[0])
    torch.testing.assert_close(callback.exported(X), callback.plain.net(X))


@pytest.mark.parametrize("memory", ["min", "256MiB"])
@pytest.mark.parametrize("export", [exported, exported_under_gathered])
def test_torch_export_sees_the_weights(tmp_path: Path, export: Any, memory: str) -> None:
    callback = run(tmp_path, export, memory)
    torch.testing.assert_close(callback.outputs[1], callback.outputs[0])


@pytest.mark.parametrize("memory", ["min", "256MiB"])
def test_torchscript_would_take_the_parameters_with_it_and_is_refused(tmp_path: Path, memory: str) -> None:
    with pytest.raises(ResidencyError, match=r"trace copy\.deepcopy\(module\)"):
        run(tmp_path, traced, memory)
