"""Blocks with habits that a second run of their forward, or memory that moves, could trip over.

Some take a ``carry``, a container that the model's forward hands from block to block, and change it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.fuzz.plain_blocks import Block, Dropout


class OwnGenerator(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.generator = torch.Generator().manual_seed(3)

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) * (torch.rand(x.shape, generator=self.generator) < 0.7)


class Counter(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.calls = 0

    def mix(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().mix(x) * (1 + 0.1 * self.calls)


class RunningBuffer(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("mean", torch.zeros(width))

    def mix(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = (0.9 * self.mean + 0.1 * x.detach().mean((0, 1))).to(self.mean.dtype)
        return super().mix(x - self.mean)


class RunningAttribute(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.mean = torch.zeros(width)

    def mix(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().float().mean((0, 1))
        return super().mix(x - self.mean.to(x.dtype))


class Memory(Block):
    """What it computed is its input the next time."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.memory: Tensor | None = None

    def mix(self, x: Tensor) -> Tensor:
        y = super().mix(x if self.memory is None else x + 0.5 * self.memory)
        self.memory = y.detach().mean((0, 1))
        return y


class Cache(Block):
    """Keys of all blocks before it, and its own, as ``past_key_values`` are."""

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        if carry is None:
            return super().forward(x)
        push(carry, self.mix(x))
        keys = torch.cat(values(carry), 1)
        return x + torch.softmax(x @ keys.transpose(1, 2), -1) @ keys


class Push(Block):
    def forward(self, x: Tensor, carry: Any = None) -> Any:
        past = values(carry)
        y = x + self.mix(x + past[-1] if past else x)
        push(carry, y)
        return y


class Pop(Block):
    """As the second half of a U-Net."""

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        return x + self.mix(x + pop(carry)) if values(carry) else x + self.mix(x)


class Tupled(Block):
    def forward(self, x: Tensor, carry: Any = None) -> Any:
        y = self.mix(x)
        return x + y, 0.01 * y.square().mean()


class MaxNorm(Block):
    """A table whose rows torch shortens in forward."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.table = nn.Embedding(8, width, max_norm=1.0)

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x + self.table(torch.arange(x.shape[1])))


class ClampsData(Block):
    def mix(self, x: Tensor) -> Tensor:
        self.up.weight.data.clamp_(-0.3, 0.3)
        return super().mix(x)


class ClampsWithoutGrad(Block):
    def mix(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.up.weight.clamp_(-0.3, 0.3)
        return super().mix(x)


class ActNorm(Block):
    """Its scale comes from the first batch."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("initialised", torch.tensor(False))

    def mix(self, x: Tensor) -> Tensor:
        if not self.initialised:
            self.scale.data.copy_(1 / (x.detach().std((0, 1)) + 1))
            self.initialised.fill_(True)
        return super().mix(x * self.scale)


class MaskedByHook(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("mask", (torch.rand(2 * width, width) < 0.7).float())
        self.up.register_forward_pre_hook(self._apply_mask)

    def _apply_mask(self, module: Any, args: Any) -> None:
        self.up.weight.data.mul_(self.mask)


class Empty(Block):
    """Parameters without elements, one of them alone in its module."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.prompt = nn.Parameter(torch.zeros(0, width))
        self.alone = nn.ParameterList([nn.Parameter(torch.zeros(0, 2))])

    def mix(self, x: Tensor) -> Tensor:
        prompt = self.prompt.expand(x.shape[0], *self.prompt.shape)
        return super().mix(torch.cat([prompt, x], 1)) + self.alone[0].sum()


class GateWithoutGrad(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gate = nn.Linear(width, width)

    def mix(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(self.gate(x))
        return super().mix(x) * gate


class Detached(Block):
    """Uses a weight with and without gradient."""

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) + 0.1 * F.linear(F.linear(x, self.up.weight.detach()), self.down.weight.detach())


class Checkpointed(Block):
    def forward(self, x: Tensor, carry: Any = None) -> Any:
        return x + checkpoint(self.mix, x, use_reentrant=False)


class CheckpointedReentrant(Block):
    def forward(self, x: Tensor, carry: Any = None) -> Any:
        return x + checkpoint(self.mix, x, use_reentrant=True)


class CheckpointedCall(Dropout):
    """As transformers' layers do."""

    def __call__(self, x: Tensor, carry: Any = None) -> Any:
        return checkpoint(super().__call__, x, use_reentrant=False)


class Shared(Block):
    def __init__(self, width: int, common: nn.Module) -> None:
        super().__init__(width)
        self.common = common

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(self.common(x))


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum((0, 1))


class CustomFunction(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(_Scale.apply(x, self.scale))


class FunctionalCall(Block):
    """Runs a submodule with values that it computes."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.tensor(0.9))

    def mix(self, x: Tensor) -> Tensor:
        changed = {"weight": self.up.weight * self.scale}
        return self.down(torch.tanh(torch.func.functional_call(self.up, changed, (x,))))


class Mapped(Block):
    def mix(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: F.linear(F.gelu(F.linear(row, self.up.weight)), self.down.weight))(x)


class Complex(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.filter = nn.Parameter(torch.randn(width, dtype=torch.complex64) * 0.3 + 1)
        self.turn = nn.Parameter(torch.randn(1, 1, dtype=torch.complex64))

    def mix(self, x: Tensor) -> Tensor:
        y = x * self.filter + 0.1 * x * self.filter.conj() * self.turn.mH
        return super().mix(torch.view_as_real(y).sum(-1) + x * self.turn.conj().imag)


class Noise(Block):
    """Draws, and makes constants, in the default dtype, which is not float32 in a step under bf16-true."""

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) * torch.rand(x.shape[-1]) + torch.linspace(0, 0.1, x.shape[-1])


class ForeignRandomness(Block):
    """Draws from Python and NumPy."""

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) * random.random() * float(np.random.rand())


class Hooked(Block):
    """Hooks on itself, on a parameter and on a tensor."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.up.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        self.down.register_forward_hook(lambda module, args, out: out + module.bias)
        self.up.register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))

    def mix(self, x: Tensor) -> Tensor:
        y = super().mix(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 0.7)
        return y


class Catches(Block):
    """Control flow by exceptions of its own."""

    def mix(self, x: Tensor) -> Tensor:
        try:
            return super().mix(x) * {}["scale"]
        except KeyError:
            return super().mix(x)


def push(carry: Any, value: Tensor) -> None:
    """Put a value into whatever ``carry`` is; None takes nothing."""
    if isinstance(carry, list):
        carry.append(value)
    elif isinstance(carry, dict):
        carry[len(carry)] = value
    elif carry is not None:
        carry.items.append(value)


def pop(carry: Any) -> Tensor:
    """Take the value that came last."""
    if isinstance(carry, dict):
        return carry.pop(len(carry) - 1)
    return (carry if isinstance(carry, list) else carry.items).pop()


def values(carry: Any) -> list[Tensor]:
    """What is in it."""
    if carry is None:
        return []
    return carry if isinstance(carry, list) else list(carry.values()) if isinstance(carry, dict) else carry.items


CARRIES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "list": list,
    "dict": dict,
    "object": lambda: SimpleNamespace(items=[]),
}
