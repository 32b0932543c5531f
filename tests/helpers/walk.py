"""Follows one unit through one step: calls that see it, functions, files, and switches from one file to another.

    python tests/helpers/walk.py [--list]

A call sees the unit if an argument is the unit, or if it is a method of an object that has it as an attribute. Both
threads count, in the order of their calls. It stands alone, so that it runs on older commits too.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH, UNIT, STEP = 64, "blocks.1", 2


class Call(NamedTuple):
    """One call that sees the unit."""

    file: str
    function: str


class Block(nn.Module):
    """Two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the block makes of ``x``."""
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Model(pl.LightningModule):
    """Four blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """A mean of squares."""
        (x,) = batch
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.head(x).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def walk() -> list[Call]:
    """The calls of the third step that see the unit."""
    import lightning_ssd
    from lightning_ssd import SSDOffloadStrategy

    root = str(Path(lightning_ssd.__file__).parent)
    calls: list[Call] = []
    is_active = False

    def is_it(value: object) -> bool:
        return type(value).__name__ == "Unit" and getattr(value, "name", "") == UNIT

    def profile(frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if not is_active or event != "call" or not code.co_filename.startswith(root):
            return
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            value = frame.f_locals.get(name)
            if is_it(value) or (name == "self" and any(map(is_it, getattr(value, "__dict__", {}).values()))):
                calls.append(Call(os.path.relpath(code.co_filename, root), getattr(code, "co_qualname", code.co_name)))
                return

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            nonlocal is_active
            is_active = index == STEP

    with tempfile.TemporaryDirectory(prefix="walk-") as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            strategy=SSDOffloadStrategy(nvme_path=folder, host_memory="min"),
            max_steps=STEP + 2,
            callbacks=[Watch()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        torch.manual_seed(0)
        threading.setprofile(profile)
        sys.setprofile(profile)
        trainer.fit(Model(), DataLoader(TensorDataset(torch.randn(STEP + 2, WIDTH)), batch_size=1))
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return calls


def main() -> None:
    """Print the numbers, and with ``--list`` each call."""
    warnings.simplefilter("ignore")
    calls = walk()
    files = [call.file for call in calls]
    switches = sum(a != b for a, b in itertools.pairwise(files))
    print(f"{len(calls)} calls, {len(set(calls))} functions, {len(set(files))} files, {switches} switches of file")
    if "--list" in sys.argv:
        for call in calls:
            print(call.file, call.function)


if __name__ == "__main__":
    main()
