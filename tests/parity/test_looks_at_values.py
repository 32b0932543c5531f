"""Code that looks at parameters between steps, and at gradients: what it makes of them is where plain Lightning has it.

On the CPU most of this is trivial; the tests are for a device with memory of its own, TEST_DEVICE=simulated_cuda.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.helpers.training import streamed
from tests.parity.test_on_any_device import Manual, Net, fit


class MasksInHooks(Net):
    """Masks and noise that hooks between steps make of parameters, used in the step and on gradients."""

    def on_train_start(self) -> None:
        self.masks = [(param.abs() > param.abs().mean()).float() for param in self.parameters()]
        self.register_buffer("mask", self.net[0].weight.detach().sign())
        self.momentum = [torch.zeros_like(param) for param in self.parameters()]

    def loss(self, batch: list[Tensor]) -> Tensor:
        noise = torch.randn_like(self.net[2].weight) * 2**-6
        penalty = (self.net[0].weight * self.mask).square().mean() + (self.net[2].weight * noise).sum()
        return super().loss(batch) + penalty * 0.125

    def on_after_backward(self) -> None:
        for param, mask, momentum in zip(self.parameters(), self.masks, self.momentum, strict=True):
            param.grad.mul_(mask)
            momentum.mul_(0.5).add_(param.grad)
            param.grad = param.grad * 0.5 + momentum
        self.seen.append([param.grad.device == self.device for param in self.parameters()])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        total = nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        norms = torch.stack([param.grad.norm() for param in self.parameters()])
        self.seen.append([total.item(), norms.tolist(), (norms.device, total.device) == (self.device, self.device)])
        self.log("norm", norms.sum())

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for param, mask in zip(self.parameters(), self.masks, strict=True):
                param.add_(torch.randn_like(param), alpha=2**-8)
                param.data.mul_(1 - 2**-4 * mask)
                param[param > 0.5] = 0.5
        self.seen.append([param.device == self.device and param.is_cpu == mask.is_cpu for param in self.parameters()])


class Pruned(Net):
    """As the callback does it, and made permanent at the end."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step in (2, 4):
            prune.l1_unstructured(self.net[0], "weight", amount=0.25)
        if self.global_step == 5:
            prune.remove(self.net[0], "weight")


class Averaged(Net):
    """A copy that a hook makes of a module, averages into, runs, and keeps in a file that it reads again."""

    def on_train_start(self) -> None:
        self.copies = [copy.deepcopy(self.net).requires_grad_(False)]

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], *args: Any) -> None:
        average = self.copies[0]
        for mean, param in zip(average.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(param.detach().to(mean.device), 0.25)
        self.seen.append(average(batch[0]).sum().item())
        file = io.BytesIO()
        torch.save(self.net.state_dict(), file)
        file.seek(0)
        average.load_state_dict(torch.load(file, map_location=self.device))
        self.seen.append((self.net(batch[0]) - average(batch[0])).abs().sum().item())


class Restarts(Net):
    """A layer is initialised anew between steps, by the generator of the device."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step % 2:
            self.net[2].reset_parameters()
            nn.init.normal_(self.net[0].weight, std=0.5)
            self.net[0].bias.data = torch.bernoulli(self.net[0].bias.detach().sigmoid())


class OwnStep(Manual):
    """A step without an optimizer's, after the user's own backward, with what the step has on the device."""

    def on_train_start(self) -> None:
        self.velocity = [torch.zeros_like(param) for param in self.parameters()]

    def training_step(self, batch: list[Tensor], index: int) -> None:
        loss = self.loss(batch)
        loss.backward()
        self.seen.append(loss.item())
        with torch.no_grad():
            for param, velocity in zip(self.parameters(), self.velocity, strict=True):
                self.seen.append((param.grad * param).sum().item() + (batch[0].sum() * param.grad).sum().item())
                param.grad.add_(torch.rand_like(param.grad), alpha=2**-8)
                velocity.mul_(0.5).add_(param.grad)
                torch.add(param.grad, velocity, out=velocity)
                param.sub_(velocity, alpha=2**-4).addcmul_(param.grad, velocity, value=2**-6)
                param.data.sub_(param.grad.sign() * 2**-8)
        clones = [param.grad.clone() for param in self.parameters()]
        self.seen.append([nn.functional.linear(batch[0], clones[0]).sum().item(), clones[0].device == self.device])
        self.zero_grad()
        self.optimizers().step()  # counts


class Surgery(Manual):
    """Gradients of two losses, one projected on the other, as the user's own backward leaves them."""

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        found: list[Tensor] = []
        for shift in (0.0, 1.0):
            optimizer.zero_grad()
            self.loss([batch[0] + shift, batch[1]]).backward()
            found.append(torch.cat([param.grad.flatten() for param in self.parameters()]))
        one, two = found
        one = one - (one @ two) / two.square().sum() * two if one @ two < 0 else one
        sizes = [param.numel() for param in self.parameters()]
        for param, grad in zip(self.parameters(), (one + two).split(sizes), strict=True):
            param.grad = grad.view_as(param)
        self.seen.append(one.sum().item())
        optimizer.step()


KINDS: dict[str, Callable[[], Net]] = {
    "masks": MasksInHooks,
    "pruned": Pruned,
    "averaged": Averaged,
    "initialised anew": Restarts,
    "own step": OwnStep,
    "gradient surgery": Surgery,
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_plain(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(5)
    plain = fit(tmp_path, KINDS[kind](), "auto")
    for settings in ({}, {"host_memory": "1GiB"}):
        ours = fit(tmp_path, KINDS[kind](), streamed(**settings))
        assert plain.seen == ours.seen
        for name, value in plain.state_dict().items():
            assert torch.equal(value, ours.state_dict()[name]), name
