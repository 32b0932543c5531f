"""A text file as token windows: tokenised once in a process of its own, split into training text and held-out tail.

As a program it is that process: ``python lm_data.py MODEL_DIR TEXT OUT.npz``. A tokenizer with a large vocabulary takes
hundreds of MB, which would otherwise count in the memory that the training run reports.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

HELD_OUT_SHARE = 0.05
"""The last twentieth of the text is never trained on."""

HELD_OUT_BATCH_SIZE = 8
"""Windows per held-out batch. Without gradients there is room for many, and each batch is a pass over the weights."""


class Tokens(NamedTuple):
    """A tokenised text: ``prefix`` is the BOS token, where the tokenizer has one."""

    prefix: np.ndarray  # 1D int32
    text: np.ndarray  # 1D int32


def load_tokens(model_dir: Path, text_file: Path, cache_dir: Path) -> Tokens:
    """Tokens of ``text_file``, from ``cache_dir`` when this text met this tokenizer before."""
    key = hashlib.sha256(text_file.read_bytes())
    for part in sorted(model_dir.glob("*token*")):
        key.update(f"{part.name} {part.stat().st_size} {part.stat().st_mtime_ns}".encode())
    cached = cache_dir / f"tokens-{key.hexdigest()[:16]}.npz"
    if not cached.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, str(model_dir), str(text_file), str(cached)], check=True)
    with np.load(cached) as arrays:
        return Tokens(arrays["prefix"], arrays["text"])


class Windows(Dataset[torch.Tensor]):
    """Disjoint windows of a token sequence, each ``seq_len + 1`` long: inputs and, one further, their targets."""

    def __init__(self, tokens: Tokens, seq_len: int) -> None:
        self._prefix = torch.from_numpy(tokens.prefix.astype(np.int64))
        self._stride = seq_len + 1 - len(self._prefix)
        num_windows = len(tokens.text) // self._stride
        if num_windows == 0:
            raise SystemExit(f"{len(tokens.text)} tokens are too few for windows of {seq_len}; use a shorter --seq-len")
        self._body = torch.from_numpy(tokens.text[: num_windows * self._stride].astype(np.int64))

    def __len__(self) -> int:
        return len(self._body) // self._stride

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.cat([self._prefix, self._body[index * self._stride : (index + 1) * self._stride]])


class TextWindows:
    """Loaders over one text. The order of training windows follows from the seed alone, so that a resumed run sees what
    the uninterrupted one would have seen."""

    def __init__(self, tokens: Tokens, seq_len: int, batch_size: int, seed: int) -> None:
        cut = int(len(tokens.text) * (1 - HELD_OUT_SHARE))
        self.train = Windows(Tokens(tokens.prefix, tokens.text[:cut]), seq_len)
        self.held_out = Windows(Tokens(tokens.prefix, tokens.text[cut:]), seq_len)
        self.batch_size = batch_size
        self._seed = seed

    def train_loader(self, first_batch: int, last_batch: int) -> DataLoader[torch.Tensor]:
        """Batches ``first_batch`` up to, not including, ``last_batch`` of the endless shuffled sequence."""
        first, last = first_batch * self.batch_size, last_batch * self.batch_size
        generator = torch.Generator().manual_seed(self._seed)
        order: list[int] = []
        while len(order) < last:
            order += torch.randperm(len(self.train), generator=generator).tolist()
        return DataLoader(self.train, batch_size=self.batch_size, sampler=order[first:last])

    def held_out_loader(self, num_batches: int) -> DataLoader[torch.Tensor]:
        """The same ``num_batches`` every time, spread evenly over the held-out text."""
        num = min(num_batches * HELD_OUT_BATCH_SIZE, len(self.held_out))
        spread = np.linspace(0, len(self.held_out) - 1, num).astype(int).tolist()
        return DataLoader(self.held_out, batch_size=HELD_OUT_BATCH_SIZE, sampler=spread)


def _tokenize(model_dir: str, text_file: str, out: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    ids = tokenizer(Path(text_file).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    partial = Path(out).with_suffix(".partial.npz")
    np.savez(partial, prefix=np.asarray(prefix, np.int32), text=np.asarray(ids, np.int32))
    partial.rename(out)  # a run that is stopped here leaves no half-written cache


if __name__ == "__main__":
    _tokenize(*sys.argv[1:])
