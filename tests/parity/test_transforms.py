"""torch.func and saved-tensor hooks in a step: plain Lightning's numbers, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.data import DataLoader

from lightning_ssd import gathered
from lightning_ssd.errors import ResidencyError
from tests.faults.support import finish_backward
from tests.helpers.training import make_trainer, streamed

WIDTH, STEPS = 8, 3


class Net(pl.LightningModule):
    def __init__(self, extra: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        # A norm's weight is saved as it is, a matrix as a view of it.
        made = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh()) for _ in range(3))
        self.net = nn.Sequential(*made)
        self.head = nn.Linear(WIDTH, WIDTH)
        self._extra = extra
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.head(self.net(batch)) - batch).square().mean() + self._extra(self, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def run(tmp_path: Path, strategy: Any, extra: Callable[[Net, Tensor], Tensor]) -> Any:
    pl.seed_everything(3, verbose=False)
    module = Net(extra)
    data = torch.randn(STEPS * 4, WIDTH, generator=torch.Generator().manual_seed(4))
    make_trainer(tmp_path, strategy, max_steps=STEPS).fit(module, DataLoader(data, batch_size=4))  # type: ignore[arg-type]
    return module.losses, [param.detach().clone() for param in module.parameters()]


def forward_mode(module: Net, x: Tensor) -> Tensor:
    out, tangent = torch.func.jvp(module.net, (x,), (torch.ones_like(x),))
    return tangent.square().mean() + out.square().mean()


def duals(module: Net, x: Tensor) -> Tensor:
    """Forward mode without torch.func; the tangents are gone when backward comes."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module.net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent.square().mean()


def reverse_mode(module: Net, x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: module.net(y).square().mean())(x).square().sum()


def jacobians(module: Net, x: Tensor) -> Tensor:
    one = x[0]
    backwards, forwards = torch.func.jacrev(module.net)(one), torch.func.jacfwd(module.net)(one)
    return backwards.square().mean() + forwards.square().mean()


def hessian(module: Net, x: Tensor) -> Tensor:
    return torch.func.hessian(lambda y: module.net(y).sum())(x[0]).square().mean()


def vectorised(module: Net, x: Tensor) -> Tensor:
    return torch.func.vmap(module.net)(x).square().mean()


def at_rest_inside(module: Net, x: Tensor) -> Tensor:
    """A parameter whose module does not run."""
    weight = module.head.weight
    return torch.func.grad(lambda y: nn.functional.linear(module.net(y), weight).square().mean())(x).square().sum()


def per_sample(module: Net, x: Tensor) -> Tensor:
    """Gradients with respect to parameters, one for each sample, after a parameter was used outside its module."""
    touched = module.net[0][0].weight.square().sum()
    with gathered(module.net):
        params = {name: value.detach() for name, value in module.net.named_parameters()}

        def loss(params: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(module.net, params, (x[None],)).square().mean()

        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    return touched * 1e-3 + sum(grad.norm() for grad in grads.values()).detach() * 1e-3


IN_REVERSE = [reverse_mode, jacobians, hessian, at_rest_inside]


def assert_equal_to_plain(tmp_path: Path, extra: Callable[[Net, Tensor], Tensor], *settings: dict[str, Any]) -> None:
    losses, weights = run(tmp_path, "auto", extra)
    for setting in settings:
        our_losses, our_weights = run(tmp_path, streamed(**setting), extra)
        assert our_losses == losses, setting
        assert all(map(torch.equal, our_weights, weights)), setting


SOME, ALL = {"host_memory": "17MiB"}, {"host_memory": "256MiB"}


@pytest.mark.parametrize("extra", [forward_mode, duals, vectorised, per_sample])
def test_it_equals_plain_lightning(tmp_path: Path, extra: Callable[[Net, Tensor], Tensor]) -> None:
    assert_equal_to_plain(tmp_path, extra, SOME, SOME | {"activations": "keep"}, ALL)


@pytest.mark.not_simulated(reason="on a device no plan does without hooks on saved tensors")
@pytest.mark.parametrize("extra", IN_REVERSE)
def test_in_reverse_mode_a_streamed_model_is_gathered(tmp_path: Path, extra: Callable[[Net, Tensor], Tensor]) -> None:
    def inside(module: Net, x: Tensor) -> Tensor:
        with gathered(module):
            return extra(module, x)

    assert_equal_to_plain(tmp_path, extra, ALL)
    assert_equal_to_plain(tmp_path, inside, SOME, ALL)
    with pytest.raises(ResidencyError, match=r"with lightning_ssd.gathered\(module\)"):
        run(tmp_path, streamed(), extra)
    finish_backward()


@pytest.mark.not_simulated(reason="on a device no plan does without hooks on saved tensors")
def test_parameters_on_disk_that_are_given_to_it_are_refused(tmp_path: Path) -> None:
    def with_respect_to_parameters(module: Net, x: Tensor) -> Tensor:
        params = dict(module.net.named_parameters())
        return torch.func.grad(lambda p: torch.func.functional_call(module.net, p, (x,)).sum())(params)["0.0.bias"]

    with pytest.raises(ResidencyError, match=r"given parameter 'weight' of a Linear.*with lightning_ssd.gathered"):
        run(tmp_path, streamed(host_memory="256MiB"), with_respect_to_parameters)
    finish_backward()


def rounded(module: Net, x: Tensor) -> Tensor:
    """Hooks that change what they are given, and are not asked twice."""
    num_packed = num_unpacked = 0

    def pack(tensor: Tensor) -> Any:
        nonlocal num_packed
        num_packed += 1
        return {"rounded": [tensor.bfloat16().float()]} if num_packed % 2 else tensor

    def unpack(packed: Any) -> Tensor:
        nonlocal num_unpacked
        num_unpacked += 1
        return packed["rounded"][0] if isinstance(packed, dict) else packed  # type: ignore[no-any-return]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = module.net(module.net(x)).square().mean()
    (grad,) = torch.autograd.grad(loss, module.net[0][0].bias, retain_graph=True)
    module.losses += [num_packed, num_unpacked, grad.abs().sum().item()]
    return loss


def on_the_host(module: Net, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return module.net(x).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("extra", [rounded, on_the_host])
def test_the_users_saved_tensor_hooks_get_what_is_saved(tmp_path: Path, extra: Any) -> None:
    assert_equal_to_plain(tmp_path, extra, {}, {"activations": "keep"}, ALL, {"units": ["Linear"]})
