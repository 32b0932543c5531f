"""Run as a program: trains blocks whose inputs are large, and prints what memory each budget took, as one JSON line.

    MALLOC_MMAP_THRESHOLD_=1048576 python -m tests.memory_bounds.inputs DIRECTORY BUDGET_NBYTES ...

A budget below 0 keeps all inputs in memory. With that threshold glibc gives each input back to the system when it is
freed; without it that holds only above 32 MiB.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_ssd.sizes import MiB
from tests.faults.support import streamed
from tests.helpers.activations import spill_inputs
from tests.helpers.training import Module, Tokens, make_trainer
from tests.memory_bounds.peak import Sampler, anonymous_nbytes

INPUT_NBYTES, WIDTH, SEQ, LAYERS = 16 * MiB, 64, 1024, 16
BATCH = INPUT_NBYTES // (4 * WIDTH * SEQ)


class Blocks(nn.Module):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x)

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(97, WIDTH)
        self.blocks = nn.ModuleList(self.Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 97)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, -16:])


class Last(Module):
    """The loss of the last positions: logits are small."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[1][:, -16:].flatten())
        self.losses.append(loss.item())
        return loss


def train(root: str, batch: int) -> list[float]:
    pl.seed_everything(1, verbose=False)
    module = Last(Blocks(), schedule=False)
    trainer = make_trainer(Path(root), streamed(nvme_path=root), max_steps=2)
    trainer.fit(module, torch.utils.data.DataLoader(Tokens(2 * batch, seq=SEQ), batch_size=batch))
    trainer.strategy.session.close()  # type: ignore[attr-defined]
    return module.losses


def measured(budget: int, root: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        spill_inputs(patch, budget=None if budget < 0 else budget, buffer_nbytes=MiB)
        train(root, 1)
        baseline = anonymous_nbytes()
        sampler = Sampler()
        sampler.start()
        losses = train(root, BATCH)
        return {"taken": sampler.stop() - baseline, "losses": losses}


def main(root: str, *budgets: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps([measured(int(budget), root) for budget in budgets]))


if __name__ == "__main__":
    main(*sys.argv[1:])
