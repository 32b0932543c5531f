"""Blocks that do what most do. Every one maps (batch, time, width) to the same shape.

Programs may hand a ``carry`` from block to block as a second argument; these do not look at it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Block(nn.Module):
    """A residual network of two layers; others change `mix`, or what happens around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        return x + self.mix(x)

    def mix(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Norm(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.LayerNorm(width)

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(self.norm(x))


class InPlace(Block):
    def mix(self, x: Tensor) -> Tensor:
        y = self.down(F.relu_(self.up(x)))
        y += x
        return y.mul_(0.5)


class WritesInput(Block):
    """Adds to the very tensor it was given."""

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        x.add_(0.1)
        return super().forward(x * 1.0)


class Dropout(Block):
    def mix(self, x: Tensor) -> Tensor:
        return F.dropout(super().mix(x), 0.3, self.training)


class BatchNorm(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width)

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(self.norm(x.transpose(1, 2)).transpose(1, 2))


class Conv(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(self.conv(x.transpose(1, 2)).transpose(1, 2))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    """torch's own layer, with its fast path in eval."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        return self.layer(x)


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        return x + self.gru(x)[0]


class Cell(nn.Module):
    """One cell, used once for each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, width)

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        state, outs = x[:, 0] * 0, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outs.append(state)
        return x + torch.stack(outs, 1)


class Nested(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)])
        self.out = Norm(width)

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        for module in self.inner:
            x = x + module(x)
        return self.out(x)


class WeightNorm(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        parametrizations.weight_norm(self.up)


class SpectralNorm(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        parametrizations.spectral_norm(self.down)


class Gate(Block):
    """A parameter without dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gate = nn.Parameter(torch.tensor(0.5))

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) * self.gate.tanh()


class Unused(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.unused = nn.Linear(width, width)


class Routed(nn.Module):
    """Which of its experts runs depends on the data."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Block(width) for _ in range(3)])

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        return self.experts[int(x.detach().float().sum().abs() * 10) % 3](x)


class LoRA(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, width) * 0.1)
        self.b = nn.Parameter(torch.randn(width, 2) * 0.1)

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) + x @ self.a.t() @ self.b.t()


class Twice(Block):
    def mix(self, x: Tensor) -> Tensor:
        return 0.5 * super().mix(super().mix(x))


class Lists(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(width, width) * 0.2) for _ in range(2)])
        self.biases = nn.ParameterDict({"a": nn.Parameter(torch.zeros(width)), "b": nn.Parameter(torch.zeros(width))})

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        for weight, bias in zip(self.weights, self.biases.values(), strict=True):
            x = x + torch.tanh(F.linear(x, weight, bias))
        return x


class Positions(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.table = nn.Parameter(torch.randn(8, width) * 0.2)

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x + self.table[: x.shape[1]])


class StochasticDepth(Block):
    def forward(self, x: Tensor, carry: Any = None) -> Any:
        return x if self.training and float(torch.rand(())) < 0.4 else super().forward(x)


class OddNames(nn.Module):
    """Attributes called as units may be."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rest, self.root = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        return x + self.root(torch.tanh(self.rest(x)))


class Transposed(Block):
    """A weight whose strides are not those of its shape."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.weight = nn.Parameter((torch.randn(width, width) * 0.3).t())

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x @ self.weight)
