"""Memory that parameters share: with each other, by ``.data``, or with tensors that the user holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader

from lightning_ssd.errors import ResidencyError
from tests.faults.support import finish_backward
from tests.helpers.training import make_trainer, streamed
from tests.parity.test_own_writes import WIDTH, Net, assert_as_plain, run


class Rearrange(Callback):
    """Gives parameters memory of their own in other ways than one by one."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:  # pieces of one tensor
            values = parameters_to_vector(module.parameters()).detach()
            vector_to_parameters(values * 0.9, module.parameters())
        elif batch_idx == 3:  # in turns
            weights = [layer.weight for layer in module.net]
            data = [weight.data for weight in weights]
            for index, weight in enumerate(weights):
                weight.data = data[index - 1]


@pytest.mark.parametrize("memory", ["min", "256MiB"])
def test_parameters_get_pieces_of_one_tensor_and_each_other_s_memory(tmp_path: Path, memory: str) -> None:
    assert_as_plain(tmp_path, Net, [{"host_memory": memory}], callbacks=lambda: [Rearrange()])


class Tie(Callback):
    def __init__(self, *, unties: bool) -> None:
        self._unties = unties

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.before = module.net[2].weight.data
        module.net[2].weight.data = module.net[0].weight.data

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if self._unties:
            module.net[2].weight.data = self.before


@pytest.mark.parametrize("memory", ["min", "256MiB"])
def test_a_parameter_may_borrow_the_memory_of_another_but_not_be_trained_so(tmp_path: Path, memory: str) -> None:
    assert_as_plain(tmp_path, Net, [{"host_memory": memory}], callbacks=lambda: [Tie(unties=True)])
    with pytest.raises(ResidencyError, match=r"net\.2\.weight.*was given the memory of.*net\.0\.weight"):
        run(tmp_path, streamed(host_memory=memory), Net, callbacks=[Tie(unties=False)])
    finish_backward()


class Alias(Callback):
    """Holds what should follow the parameter."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.alias = module.net[0].weight.data


class Lend(Alias):
    """Gives a parameter memory that it goes on to hold."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.alias = module.net[0].weight.data = torch.ones(WIDTH, WIDTH)


class AliasFromTheStart(Net):
    def __init__(self) -> None:
        super().__init__()
        self.alias = self.net[0].weight.detach()


@pytest.mark.not_simulated(reason="moved to a device, plain Lightning's parameter leaves it behind too", only=["Start"])
@pytest.mark.parametrize(("make", "callback"), [(Net, Alias), (Net, Lend), (AliasFromTheStart, Callback)])
def test_a_view_that_an_update_would_leave_behind_is_told_of(tmp_path: Path, make: Any, callback: Any) -> None:
    with pytest.warns(UserWarning, match=r"made from parameter 'net\.0\.weight'.*is still held"):
        run(tmp_path, streamed(), make, callbacks=[callback()])


def test_what_a_fit_shows_is_no_view_of_the_user_s(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    module = Net()
    data = DataLoader(torch.randn(8, WIDTH), batch_size=4)  # type: ignore[arg-type]
    trainers = [make_trainer(tmp_path, streamed(), max_steps=2, limit_val_batches=0) for _ in range(2)]
    for trainer in trainers:
        trainer.fit(module, data)
    assert not [warning for warning in recwarn if "is still held" in str(warning.message)]
