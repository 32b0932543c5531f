"""Models of 30 shapes with about 30 million parameters each, and the programs that train them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.models import GPT, ConvBlock

Batch = tuple[Tensor, Tensor]
Rows = list[Batch]


@dataclass(frozen=True)
class Shape:
    """One program.

    Attributes:
        make: Builds the network; called in ``configure_model``.
        batch: One batch.
        module: Trains it.
        optimizer: Makes its optimizer.
        trainer: Arguments of the Trainer.
        strategy: Arguments of the strategy.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    module: type[Trained]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)


class Trained(pl.LightningModule):
    """A regression, or next tokens where the batch holds whole numbers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = self.shape.make()

    def loss(self, batch: Batch) -> Tensor:
        out = self.net(batch[0])
        if batch[1].is_floating_point():
            return F.mse_loss(out.float(), batch[1])
        return F.cross_entropy(out.float().reshape(-1, out.shape[-1]), batch[1].reshape(-1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.shape.optimizer([p for p in self.parameters() if p.requires_grad])


class Listening(Trained):
    """Somebody looks at gradients."""

    def on_after_backward(self) -> None:
        self.norm = sum(float(p.grad.norm()) for p in self.parameters() if p.grad is not None)


class Manual(Trained):
    """Two optimizers over two halves of the model, two backwards."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.step()
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        params = [p for p in self.parameters() if p.requires_grad]
        return [self.shape.optimizer(params[::2]), self.shape.optimizer(params[1::2])]


class Looking(pl.Callback):
    """A callback that looks at gradients."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.num = sum(p.grad is not None for p in module.parameters())


# ----------------------------------------------------------------------------------------------------------- networks


class Mlp(nn.Module):
    """Blocks of one matrix each."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Residual(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.linear(x)) / 1024  # so that a thousand of them do not overflow


class Tiny(nn.Module):
    """Many parameters without a module of their own."""

    def __init__(self, num: int, width: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.full((width,), 1e-3)) for _ in range(num))

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = x + scale
        return x


class Uneven(nn.Module):
    """Layers of which no two are alike, each below the size of a unit: all of them are one unit that stays."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Convs(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvBlock(width, inplace=False) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Tables(nn.Module):
    def __init__(self, num: int, rows: int, width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(num))
        self.head = nn.Linear(num * width, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.cat([table(ids).mean(1) for table in self.tables], -1))


class Shared(nn.Module):
    """A few blocks, each used several times."""

    def __init__(self, width: int, layers: int, turns: int) -> None:
        super().__init__()
        self.net = Mlp(width, layers)
        self.turns = turns

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.turns):
            x = self.net(x)
        return x


class Adapted(nn.Module):
    """Frozen matrices with small trainable ones beside them."""

    def __init__(self, width: int, layers: int, rank: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Adapted(width, rank) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Adapted(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) + self.up(self.down(x))


class Experts(nn.Module):
    """Of each layer's experts one runs."""

    def __init__(self, width: int, layers: int, experts: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp(width, experts) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer.blocks[i % len(layer.blocks)](x)
        return x


class Recurrent(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Encoder(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True)
        self.net = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def frozen(make: Callable[[], nn.Module], every: int) -> Callable[[], nn.Module]:
    """Of the blocks that ``make`` builds, only one in ``every`` is trained; of the rest nothing, if it is 0."""

    def build() -> nn.Module:
        net = make()
        blocks: Any = net.blocks
        for i, block in enumerate(blocks):
            block.requires_grad_(i % every == 0 if every else i == len(blocks) - 1)
        return net

    return build


# ------------------------------------------------------------------------------------------------------------- batches


def rows(width: int, batch: int = 4) -> Callable[[], Batch]:
    return lambda: (torch.randn(batch, width), torch.randn(batch, width))


def sequences(width: int, length: int = 16) -> Callable[[], Batch]:
    return lambda: (torch.randn(2, length, width), torch.randn(2, length, width))


def tokens(vocab: int, length: int = 32) -> Callable[[], Batch]:
    return lambda: (torch.randint(vocab, (2, length)), torch.randint(vocab, (2, length)))


def images(side: int = 8) -> Callable[[], Batch]:
    return lambda: (torch.randn(2, 3, side, side), torch.randint(10, (2,)))


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4)


def shape(
    make: Callable[[], nn.Module],
    batch: Callable[[], Batch],
    *,
    module: type[Trained] = Trained,
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    strategy: dict[str, Any] | None = None,
    **trainer: Any,
) -> Shape:
    """A `Shape`; what is left over goes to the Trainer."""
    return Shape(make, batch, module, optimizer, trainer, strategy or {})


DEEP = (lambda: Mlp(864, 40), rows(864))
WIDE = (lambda: Mlp(2748, 4), rows(2748))
GPT_TIED = (lambda: GPT(vocab=20_000, width=512, layers=6, seq=32, tie=True), tokens(20_000))

SHAPES: dict[str, Shape] = {
    "deep": shape(*DEEP),
    "deep, small blocks": shape(lambda: Mlp(256, 460), rows(256)),
    "wide": shape(*WIDE),
    "one matrix": shape(lambda: nn.Linear(2048, 14_600), lambda: (torch.randn(2, 2048), torch.randn(2, 14_600))),
    "conv": shape(lambda: Convs(512, 6), images()),
    "conv, deep": shape(lambda: Convs(128, 100), images()),
    "gpt": shape(lambda: GPT(vocab=12_000, width=512, layers=6, seq=32), tokens(12_000)),
    "tied": shape(*GPT_TIED),
    "tied, mostly": shape(lambda: GPT(vocab=50_000, width=512, layers=2, seq=32, tie=True), tokens(50_000)),
    "20,000 tiny": shape(lambda: Tiny(20_000, 64), rows(64)),
    "1,000 tiny blocks": shape(lambda: Mlp(16, 1000), rows(16)),
    "no two alike": shape(
        lambda: Uneven([830 + i for i in range(41)]), lambda: (torch.randn(4, 830), torch.randn(4, 870))
    ),
    "frozen but the last": shape(frozen(lambda: Mlp(864, 40), 0), rows(864)),
    "frozen by turns": shape(frozen(lambda: Mlp(864, 40), 2), rows(864)),
    "adapters": shape(lambda: Adapted(864, 40, 8), rows(864)),
    "deep, clipped": shape(*DEEP, gradient_clip_val=0.1),
    "deep, small blocks, clipped": shape(lambda: Mlp(256, 460), rows(256), gradient_clip_val=0.1),
    "wide, clipped": shape(*WIDE, gradient_clip_val=0.1),
    "tied, clipped": shape(*GPT_TIED, gradient_clip_val=0.1),
    "deep, accumulated": shape(*DEEP, accumulate_grad_batches=2),
    "wide, accumulated, clipped": shape(*WIDE, accumulate_grad_batches=2, gradient_clip_val=0.1),
    "deep, a hook looks": shape(*DEEP, module=Listening),
    "conv, a callback looks": shape(lambda: Convs(512, 6), images(), callbacks=[Looking()]),
    "manual, two optimizers": shape(*DEEP, module=Manual),
    "amsgrad": shape(*DEEP, optimizer=lambda params: torch.optim.AdamW(params, amsgrad=True)),
    "amsgrad, wide, clipped": shape(
        *WIDE, optimizer=lambda params: torch.optim.AdamW(params, amsgrad=True), gradient_clip_val=0.1
    ),
    "rmsprop, three states": shape(
        *DEEP, optimizer=lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True)
    ),
    "shared blocks": shape(lambda: Shared(864, 40, 3), rows(864)),
    "embeddings": shape(lambda: Tables(8, 60_000, 64), lambda: (torch.randint(60_000, (4, 8)), torch.randn(4, 32))),
    "experts": shape(lambda: Experts(864, 10, 4), rows(864)),
    "lstm": shape(lambda: Recurrent(1024, 4), sequences(1024)),
    "encoder": shape(lambda: Encoder(768, 4), sequences(768)),
    "gpt, bf16-true": shape(*GPT_TIED, precision="bf16-true"),
    "gpt, bf16-mixed, clipped": shape(*GPT_TIED, precision="bf16-mixed", gradient_clip_val=0.1),
    "deep, kept activations": shape(*DEEP, strategy={"activations": "keep"}),
    "deep, no overlap": shape(*DEEP, strategy={"overlap": "off"}),
}
