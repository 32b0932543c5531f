"""What a step sees of parameters and gradients is where compute is, and it does what plain Lightning does there.

On the CPU most of this is trivial; the tests are for a device with memory of its own, TEST_DEVICE=simulated_cuda.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.models import GPT
from tests.helpers.training import assert_equal, make_trainer, streamed, train


class Net(pl.LightningModule):
    """Two layers; subclasses say what else happens in a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self.seen: list[Any] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, labels = batch
        return nn.functional.cross_entropy(self.net(x), labels)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        loss = self.loss(batch)
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=2**-3, momentum=0.5)


class Manual(Net):
    """Runs backward and steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class DirectBackward(Manual):
    """Twice, then a step: the second adds to what the first has left."""

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for factor in (1.0, 0.5):
            loss = self.loss(batch) * factor
            loss.backward()
            self.seen.append([p.grad.cpu().tolist() for p in self.parameters()])
        optimizer.step()


class FailedBackward(DirectBackward):
    """The user goes on after a backward that failed: gradients of before it are there."""

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        with pytest.raises(ArithmeticError):
            _Fails.apply(self.net[0](batch[0])).sum().backward()
        self.seen.append([p.grad.cpu().tolist() for p in self.parameters()])
        self.loss(batch).backward()
        optimizer.step()


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")


class AfterBackward(Net):
    def on_after_backward(self) -> None:
        for param in self.parameters():
            self.seen.append(param.grad.norm().item())
            param.grad.mul_(0.5)


class GradientPenalty(Net):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        assert loss is not None
        grads = torch.autograd.grad(loss, list(self.parameters()), create_graph=True)
        return loss + 0.1 * sum(grad.square().sum() for grad in grads)


class SomeGradients(Manual):
    """After a backward that keeps the graph, gradients are asked of the same graph."""

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward(retain_graph=True)
        grads = torch.autograd.grad(loss, [self.net[0].weight, self.net[2].bias])
        self.seen.append([grad.sum().item() for grad in grads])
        optimizer.step()


FORMS: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "device": lambda p: torch.ones(8, device=p.device),
    "is_cuda": lambda p: torch.ones(8).cuda() if p.is_cuda else torch.ones(8),
    "get_device": lambda p: torch.ones(8, device=p.get_device() if p.get_device() >= 0 else "cpu"),
    "zeros_like": torch.zeros_like,
    "new_ones": lambda p: p.new_ones(8),
    "to": lambda p: torch.ones(8).to(p),
}


class AsksForForm(Net):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.make = FORMS[name]

    def loss(self, batch: list[Tensor]) -> Tensor:
        weight, bias = self.net[0].weight, self.net[0].bias
        self.seen.append((weight.stride(), weight.is_contiguous(), weight.storage_offset(), bias.stride(0)))
        like = torch.empty_like(weight)
        self.seen.append((like.stride(), like.device == self.device))
        return super().loss([batch[0] + self.make(bias), batch[1]])


class PrunedInAStep(Net):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        if index == 1:
            mask = torch.zeros_like(self.net[0].weight)
            mask[::2] = 1
            self.mask = mask
        loss = super().training_step(batch, index)
        return loss if index == 0 else loss + (self.net[0].weight * self.mask).abs().sum()


class Measured(Net):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.register_buffer("scale", torch.tensor(2.0))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, labels = batch
        out = self.net(x) * self.scale
        self.accuracy(out, labels)
        self.log("accuracy", self.accuracy)
        self.seen.append(self.accuracy.compute().item())
        return nn.functional.cross_entropy(out, labels)


class Recurrent(Net):
    """Its module has a list of its parameters, which its own ``_apply`` makes."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.RNN(8, 8, num_layers=2)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss([self.cells(batch[0])[0], batch[1]])


class ReadsBetweenSteps(Net):
    """A parameter that no module's forward brings was read outside of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss([batch[0] * self.scale, batch[1]])

    def on_train_batch_start(self, batch: list[Tensor], index: int) -> None:
        self.seen.append(self.scale.sum().item())


class Teaches(Net):
    """A teacher that a hook updates from its student between forward and backward, in several operations."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(8, 3).requires_grad_(False)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) + nn.functional.linear(batch[0], self.teacher.weight).square().mean()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.net[2].parameters(), strict=True):
                teacher.copy_(0.9 * teacher + 0.1 * student)


class ChangesGradients(Net):
    """By what the parameters are, in each hook that may."""

    def on_after_backward(self) -> None:
        for param in self.parameters():
            param.grad = param.grad * 0.5
            param.grad.add_(param.detach(), alpha=0.125)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for param in self.parameters():
            param.grad = param.grad + 0.25 * param.detach()
        self.seen.append(self.net[0].weight.grad.sum().item())


class ManualBackward(DirectBackward):
    """Parameters are used before the backward, between two, and after them."""

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            loss = self.loss(batch) + self.net[0].weight.square().sum()
            self.manual_backward(loss)
            self.seen.append(self.net[0].weight.sum().item())
        optimizer.step()
        self.seen.append((self.net[2].weight @ batch[0].T).sum().item())


def fit(tmp_path: Path, module: Net, strategy: Any, **options: Any) -> Net:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(40, 8, generator=generator), torch.randint(0, 3, (40,), generator=generator))
    make_trainer(tmp_path, strategy, **({"max_steps": 6} | options)).fit(module, DataLoader(data, batch_size=4))
    return module


KINDS: dict[str, Callable[[], Net]] = {
    "plain": Net,
    "backward of a loss": DirectBackward,
    "backward that failed": FailedBackward,
    "on_after_backward": AfterBackward,
    "gradient penalty": GradientPenalty,
    "gradients of a graph that was kept": SomeGradients,
    "pruned": PrunedInAStep,
    "metric": Measured,
    "recurrent": Recurrent,
    "reads between steps": ReadsBetweenSteps,
    "teacher": Teaches,
    "changes gradients": ChangesGradients,
    "manual backward": ManualBackward,
} | {f"form, {name}": functools.partial(AsksForForm, name) for name in FORMS}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_plain(tmp_path: Path, kind: str, accumulate: int) -> None:
    if accumulate > 1 and not KINDS[kind]().automatic_optimization:
        pytest.skip("in manual optimization the user accumulates")
    plain = fit(tmp_path, KINDS[kind](), "auto", accumulate_grad_batches=accumulate)
    ours = fit(tmp_path, KINDS[kind](), streamed(), accumulate_grad_batches=accumulate)
    assert plain.seen == ours.seen
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_the_gradients_of_a_tied_weight_are_summed_as_in_plain_lightning(tmp_path: Path, activations: Any) -> None:
    make_net = functools.partial(GPT, tie=True)
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_steps": 6}
    plain = train(tmp_path, make_net, **options)
    assert_equal(plain, train(tmp_path, make_net, streamed(activations=activations), **options))


def test_after_fit_all_of_a_module_is_where_it_says(tmp_path: Path) -> None:
    module = fit(tmp_path, Measured(), streamed())
    assert {tensor.device for tensor in module.state_dict().values()} == {module.device} == {module.accuracy.device}
    assert module.device == torch.device("cpu")
    fit(tmp_path, module, "auto")
    assert len(module.seen) == 12
