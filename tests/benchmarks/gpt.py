"""The GPT that our own benchmarks train: random weights made in `configure_model`, random tokens, AdamW."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tests.helpers.models import Block

SIZES = {  # layers, width, heads
    "tiny": (2, 128, 4),
    "124m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "1.3b": (24, 2048, 16),
    "2.7b": (32, 2560, 32),
    "4b": (32, 3072, 24),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "66b": (64, 9216, 72),
}
VOCAB, SEQ = 25600, 256


def numel(size: str, vocab: int = VOCAB, seq: int = SEQ) -> int:
    """Parameters of a model, by arithmetic."""
    layers, width, _ = SIZES[size]
    # A block: 12 matrices of width x width, their biases (9 widths) and two norms.
    return layers * (12 * width**2 + 13 * width) + (2 * vocab + seq + 2) * width


class GPT(nn.Module):
    """``recompute``: torch's own checkpointing of each block, for runs without the strategy; ``layers``: not all."""

    def __init__(
        self, size: str, *, vocab: int = VOCAB, seq: int = SEQ, recompute: bool = False, layers: int | None = None
    ) -> None:
        super().__init__()
        num_layers, width, heads = SIZES[size]
        self.recompute = recompute
        self.tok = nn.Embedding(vocab, width)
        self.pos = nn.Embedding(seq, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(num_layers if layers is None else layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else block(x)
        return self.head(self.norm(x))


class Module(pl.LightningModule):
    """Trains a `GPT` of a size, made with ``options``, by AdamW, ``fused`` or not (Lightning clips only if not)."""

    def __init__(self, size: str, *, fused: bool = True, **options: Any) -> None:
        super().__init__()
        self.size = size
        self.fused = fused
        self.options = options
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = GPT(self.size, **self.options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0]).float()
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), batch[1].view(-1))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=self.fused)


def batches(num: int, batch: int = 1, seq: int = SEQ) -> DataLoader[Any]:
    """``num`` batches of random tokens, the same in every run."""
    tokens = torch.randint(0, 512, (num * batch, seq + 1), generator=torch.Generator().manual_seed(0))
    return DataLoader([(row[:-1], row[1:]) for row in tokens], batch_size=batch)
