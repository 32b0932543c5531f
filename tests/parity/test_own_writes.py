"""Modules that write to their own parameters, and values that are swapped from outside: plain Lightning's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.errors import ConfigurationError, ResidencyError
from tests.faults.support import finish_backward
from tests.helpers.training import make_trainer, streamed
from tests.simulated_cuda import requested

WIDTH, STEPS = 16, 6


class BoundedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, WIDTH, max_norm=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table((x[:, 0] > 0).long() + (x[:, 1] > 0).long())


class ActNorm(nn.Module):
    """Initialises itself from its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.shift, self.scale = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("is_initialised", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if not self.is_initialised:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
                self.scale.copy_(1 / (x.std(0) + 1e-6))
                self.is_initialised.fill_(True)
        return self.scale * (x + self.shift)


class Masked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(WIDTH, WIDTH).tril())

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return F.linear(x, self.weight, self.bias).tanh()


class Bounded(nn.Linear):
    """Nothing is outside its bounds in the first steps."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.255, 0.255)
        return F.linear(x, self.weight, self.bias).tanh()


class Assigned(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clamp(-0.2, 0.2)
        return F.linear(x, self.weight, self.bias).tanh()


class Hidden(nn.Linear):
    """Its forward does not say that it writes."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def prune(self) -> None:
        self.weight.data[0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.prune()
        return F.linear(x, self.weight, self.bias).tanh()


def halve(param: nn.Parameter) -> None:
    param.data.mul_(0.5)


class HalvesLater(nn.Linear):
    """By a function of its own file, in a training forward that is neither the first nor the second."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        if self.num_calls == 3:
            halve(self.weight)
        return F.linear(x, self.weight, self.bias).tanh()


def pruned() -> nn.Module:
    """A mask in a hook."""

    def prune(module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            layer[0].weight[:, ::2] = 0.0

    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    layer.register_forward_pre_hook(prune)
    return layer


class Net(pl.LightningModule):
    def __init__(self, make: Callable[[], nn.Module] = lambda: nn.Linear(WIDTH, WIDTH)) -> None:
        super().__init__()
        self.net = nn.Sequential(*(make() for _ in range(3)))
        self.seen: list[float] = []

    def loss(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - batch).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.loss(batch).item())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def run(tmp_path: Path, strategy: Any, make: Callable[[], Net], **trainer: Any) -> Any:
    pl.seed_everything(3, verbose=False)
    module = make()
    data = DataLoader(torch.randn(STEPS * 4, WIDTH, generator=torch.Generator().manual_seed(4)), batch_size=4)  # type: ignore[arg-type]
    options = {"max_steps": STEPS, "val_check_interval": 2, "limit_val_batches": 1} | trainer
    make_trainer(tmp_path, strategy, **options).fit(module, data, data)
    return module.seen, {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_as_plain(tmp_path: Path, make: Callable[[], Net], settings: list[dict[str, Any]], **trainer: Any) -> None:
    callbacks = trainer.pop("callbacks", list)
    seen, weights = run(tmp_path, "auto", make, callbacks=callbacks(), **trainer)
    for setting in settings:
        our_seen, our_weights = run(tmp_path, streamed(**setting), make, callbacks=callbacks(), **trainer)
        assert our_seen == seen, setting
        assert [name for name in weights if not torch.equal(weights[name], our_weights[name])] == [], setting


KINDS = [BoundedEmbedding, ActNorm, Masked, Bounded, Assigned, Hidden, HalvesLater, pruned]


@pytest.mark.parametrize("make", KINDS)
def test_what_a_module_writes_to_itself_counts(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    keeps = {"activations": "keep"}
    assert_as_plain(tmp_path, lambda: Net(make), [{}, keeps, {"host_memory": "256MiB"}])
    assert_as_plain(tmp_path, lambda: Net(make), [{}, keeps], gradient_clip_val=0.5)


class WritesInBackward(nn.Linear):
    """In a hook, when its gradients are there."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.register_full_backward_hook(self.shift)

    @torch.no_grad()
    def shift(self, module: nn.Module, into: Any, out: Any) -> None:
        self.bias.add_(0.01)


def test_a_write_that_an_update_in_backward_overtakes_is_told_of(tmp_path: Path) -> None:
    keeps = {"activations": "keep"}
    in_memory = {"host_memory": "256MiB"}  # where compute is, so that the update finds it
    assert_as_plain(
        tmp_path, lambda: Net(WritesInBackward), [keeps | {"overlap": "off"}, *([] if requested() else [in_memory])]
    )
    with pytest.raises(ResidencyError, match=r"net\.\d.*while their optimizer updated them.*overlap='off'"):
        run(tmp_path, streamed(**keeps), lambda: Net(WritesInBackward))
    finish_backward()


class ReadsInBackward(Net):
    """A hook of an activation sends gradients through a later layer, which has its gradients by then."""

    def loss(self, batch: Tensor) -> Tensor:
        first = self.net[0](batch)
        if first.requires_grad:
            first.register_hook(self._through)
        return (self.net[2](self.net[1](first)) - batch).square().mean()

    @torch.no_grad()
    def _through(self, grad: Tensor) -> Tensor:
        return grad + self.net[2](grad)  # type: ignore[no-any-return]


def test_a_read_that_an_update_in_backward_overtakes_is_told_of(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    assert_as_plain(tmp_path, ReadsInBackward, [{"overlap": "off"}, {"overlap": "off", "host_memory": "256MiB"}])
    assert not [warning for warning in recwarn if "updated already" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"inside backward .* unit 'net\.2'.*updated already.*overlap='off'"):
        run(tmp_path, streamed(), ReadsInBackward)


class Unseen(nn.Linear):
    """Scaled by its first input, in a way that no code shows."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.is_new = True

    def forward(self, x: Tensor) -> Tensor:
        if self.is_new:
            setattr(self.bias, "da" + "ta", x.detach().mean(0))
            self.is_new = False
        return F.linear(x, self.weight, self.bias).tanh()


def test_what_is_written_in_a_first_forward_counts_in_evaluation_too(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, lambda: Net(Unseen), [{}, {"activations": "keep"}], num_sanity_val_steps=1)


class Swap(Callback):
    """Averaged weights for validation, by ``p.data``, and the trained ones back afterwards."""

    def __init__(self, *, exchanges: bool = False) -> None:
        self.averages: list[Tensor] = []
        self.backup: list[Tensor] = []
        self.exchanges = exchanges

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.averages = [param.detach().clone() for param in module.parameters()]

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        for average, param in zip(self.averages, module.parameters(), strict=True):
            average.lerp_(param.data, 0.1)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.backup = [param.data for param in module.parameters()]
        for param, average in zip(module.parameters(), self.averages, strict=True):
            param.data = average

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        for param, values in zip(module.parameters(), self.backup, strict=True):
            param.data = values


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_values_that_are_swapped_in_for_validation_and_out_again(tmp_path: Path, precision: Any) -> None:
    settings: list[dict[str, Any]] = [{}, {"host_memory": "256MiB"}, {"host_memory": "256MiB", "overlap": "off"}]
    assert_as_plain(tmp_path, Net, settings, callbacks=lambda: [Swap()], precision=precision)


def test_parameters_that_share_memory_are_refused_by_name(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net[2].weight.data = self.net[0].weight.data

    with pytest.raises(ConfigurationError, match=r"net\.0\.weight.*net\.2\.weight.*one parameter"):
        run(tmp_path, streamed(), Tied)

    class Registered(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("before", self.net[0].weight.data)

    with pytest.raises(ConfigurationError, match=r"buffer 'before' views .* 'net\.0\.weight'.*clone"):
        run(tmp_path, streamed(), Registered)


class AroundTheClosure(Net):
    """Computes with rounded weights, and updates the exact ones."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        exact = [param.detach().clone() for param in self.parameters()]

        def closure() -> Any:
            for param in self.parameters():
                param.data.mul_(16).round_().div_(16)
            loss = optimizer_closure()
            for param, value in zip(self.parameters(), exact, strict=True):
                param.data.copy_(value)
            return loss

        optimizer.step(closure)


def test_a_closure_around_lightnings_writes_before_the_update(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, AroundTheClosure, [{}, {"host_memory": "256MiB"}])


class SecondOrder(Net):
    """Divides gradients by the diagonal of the Hessian: differentiates them once more."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx), create_graph=True)
        params = list(self.parameters())
        grads = [param.grad for param in params if param.grad is not None]
        curvature = torch.autograd.grad(grads, params, [torch.ones_like(grad) for grad in grads])
        for param, grad, each in zip(params, grads, curvature, strict=True):
            param.grad = grad.detach() / (each.abs() + 1)
        optimizer.step()
        optimizer.zero_grad()


def test_gradients_that_have_a_graph_keep_it(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, SecondOrder, [{}, {"host_memory": "256MiB"}])


def write_after_forward(module: Net) -> None:
    for param in module.net.parameters():
        param.data.mul_(0.9)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Late(Net):
    """Writes to its weights between forward and backward, where no version tells autograd."""

    def __init__(self) -> None:
        super().__init__(Block)

    def loss(self, batch: Tensor) -> Tensor:
        loss = super().loss(batch)
        if self.training:
            write_after_forward(self)
        return loss


def test_writes_between_forward_and_backward(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, Late, [{"activations": "keep"}, {"host_memory": "256MiB"}])
    with pytest.raises(RuntimeError, match=r"written to between its forward and its backward.*activations='keep'"):
        run(tmp_path, streamed(), Late)
    finish_backward()
