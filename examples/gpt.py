"""A GPT from scratch, on bytes: no tokenizer, no download, no model but the forty lines below.

    python gpt.py --steps 200
    python gpt.py --text FILE --width 1024 --depth 24 --host-memory 2GiB

Without ``--text`` it learns from the sources of Python's standard library. In the end it writes some text.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_ssd import SSDOffloadStrategy

VOCABULARY = 256


class Block(nn.Module):
    """Attention and a feed-forward layer: the unit that is streamed."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[batch, length, width]`` -> the same."""
        query, key, value = self.to_qkv(self.norm_1(hidden)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        heads = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), is_causal=True)
        hidden = hidden + self.out(heads.transpose(1, 2).flatten(-2))
        return hidden + self.down(F.gelu(self.up(self.norm_2(hidden))))


class GPT(LightningModule):
    """A GPT over bytes; nothing in it knows where its weights are.

    Args:
        width: Hidden size.
        depth: Number of blocks.
        num_heads: Of each block.
        context: Bytes that it sees.
        lr: Learning rate of AdamW.
    """

    def __init__(self, width: int = 128, depth: int = 4, num_heads: int = 4, context: int = 128, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.sizes = (width, depth, num_heads)
        self.context = context
        self.lr = lr
        self.blocks: nn.Sequential | None = None

    @override
    def configure_model(self) -> None:
        # Here and not in __init__: the strategy then puts each weight where it belongs as it is created.
        if self.blocks is None:
            width, depth, num_heads = self.sizes
            self.token = nn.Embedding(VOCABULARY, width)
            self.place = nn.Embedding(self.context, width)
            self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, VOCABULARY, bias=False)

    @override
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of each next byte, ``[batch, length, 256]``, for ``[batch, length]``."""
        assert self.blocks is not None
        place = self.place(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(self.token(tokens) + place)))

    @override
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    @override
    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        for _ in range(self.context - batch.shape[1]):
            batch = torch.cat([batch, self(batch)[:, -1].argmax(-1, keepdim=True)], dim=1)
        return batch

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Text(LightningDataModule):
    """Windows of a file's bytes, at random places.

    Args:
        file: None reads the sources of Python's standard library.
        context: Bytes that the model sees.
        batch_size: Windows in a batch.
    """

    def __init__(self, file: Path | None = None, context: int = 128, batch_size: int = 16) -> None:
        super().__init__()
        library = Path(sysconfig.get_path("stdlib"))
        files = sorted(library.glob("*.py")) if file is None else [file]
        self.windows = _Windows(b"\n".join(path.read_bytes() for path in files), context)
        self.batch_size = batch_size

    @override
    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(self.windows, batch_size=self.batch_size, shuffle=True, drop_last=True)


class _Windows(Dataset[torch.Tensor]):
    def __init__(self, text: bytes, context: int) -> None:
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._context = context

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self._context

    def __getitem__(self, index: int) -> torch.Tensor:
        begin = index * self._context
        return self._bytes[begin : begin + self._context + 1].long()


def main() -> None:
    """Train, save, write some text."""
    args = parse_args()
    seed_everything(args.seed, verbose=False)
    module = GPT(args.width, args.depth, args.heads, args.context, args.lr)
    trainer = Trainer(
        strategy=SSDOffloadStrategy(nvme_path=args.nvme_path, host_memory=args.host_memory),
        accelerator=args.accelerator,
        devices=1,
        max_steps=args.steps,
        enable_checkpointing=False,  # one checkpoint, at the end
        logger=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, Text(args.text, args.context, args.batch_size), ckpt_path=args.resume)
    trainer.save_checkpoint(args.out / f"step-{trainer.global_step}.ckpt")
    print(f"loss {trainer.callback_metrics['loss']:.4f} after {trainer.global_step} steps; it writes:")
    prompts = DataLoader([torch.tensor(list(args.prompt.encode()))], batch_size=1)
    for texts in trainer.predict(module, prompts) or []:
        print(bytes(texts[0].tolist()).decode(errors="replace"))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, help="file to learn from; default: the sources of Python's standard library")
    add("--out", type=Path, default=Path("out"), help="the checkpoint goes here")
    add("--resume", type=Path, help="checkpoint to continue from; --steps counts from the very first step")
    add("--steps", type=int, default=200, help="optimizer steps")
    add("--batch-size", type=int, default=16)
    add("--context", type=int, default=128, help="bytes that the model sees")
    add("--width", type=int, default=128)
    add("--depth", type=int, default=4, help="number of blocks")
    add("--heads", type=int, default=4)
    add("--lr", type=float, default=1e-3)
    add("--prompt", default="def ")
    add("--seed", type=int, default=0)
    add("--accelerator", default="auto")
    add("--nvme-path", help="directory on the SSD; default: $LIGHTNING_SSD_PATH, else under the current directory")
    add("--host-memory", default="auto", help='budget such as "2GiB", "auto" or "min"')
    return parser.parse_args()


if __name__ == "__main__":
    main()
