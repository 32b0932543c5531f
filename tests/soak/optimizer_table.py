"""How every class of torch.optim, pytorch_optimizer and schedulefree is run, and whether it equals plain Lightning.

``python -m tests.soak.optimizer_table OUT.jsonl`` writes a line a class: streams, whole or refused, and equal or not
over 12 steps of a small model at ``host_memory="min"``, with a gate (clipping) and without.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_ssd import SSDOffloadStrategy
from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.optim.whole import WholeRule

NUM_STEPS = 12
MODULES = ("torch.optim", "pytorch_optimizer", "schedulefree")


class Model(pl.LightningModule):
    """Three blocks and a head with a dimension of 1."""

    def __init__(self, cls: type[Optimizer]) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(16, 1)
        self._cls = cls
        self.losses: list[float] = []

    def training_step(self, batch: Tensor) -> Tensor:
        loss = self.head(self.net(batch)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Optimizer:
        optimizer = self._cls(self.parameters())
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer


def classes() -> Iterator[tuple[str, type[Optimizer]]]:
    """All optimizer classes, by full name."""
    for name in MODULES:
        module = importlib.import_module(name)
        for key, cls in sorted(vars(module).items()):
            if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer:
                yield f"{name}.{key}", cls


def train(cls: type[Optimizer], strategy: object, clip: float | None) -> Model:
    """A fit of `NUM_STEPS` steps."""
    torch.manual_seed(0)
    model = Model(cls)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            max_steps=NUM_STEPS,
            gradient_clip_val=clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(model, DataLoader(torch.randn(4 * NUM_STEPS, 16, generator=torch.Generator().manual_seed(1)), 4))
        model.params = [p.detach().clone() for p in model.parameters()]
    return model


def row(name: str, cls: type[Optimizer]) -> dict[str, object]:
    """What becomes of one class."""
    found: dict[str, object] = {"optimizer": name}
    for mode, clip in (("free", None), ("gated", 0.5)):
        try:
            plain = train(cls, "auto", clip)
        except Exception as error:  # a class may need what a plain fit does not give it
            return {**found, "run": "plain fails", "why": f"{type(error).__name__}: {str(error)[:150]}"}
        strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0, update="torch")
        try:
            ours = train(cls, strategy, clip)
        except SSDOffloadError as error:
            return {**found, "run": "refused", "why": str(error)[:300]}
        except Exception as error:
            return {**found, "run": "FAILS", "why": f"{type(error).__name__}: {str(error)[:300]}"}
        rule = strategy.session.optimizers[0].rule
        found |= {"run": "whole", "why": rule.why} if isinstance(rule, WholeRule) else {"run": "streams"}
        same = all(a == b or (a != a and b != b) for a, b in zip(plain.losses, ours.losses, strict=True))
        found[mode] = same and all(
            torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(plain.params, ours.params, strict=True)
        )
    return found


def main() -> None:
    """See the module."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with open(sys.argv[1], "w") as out:
        for name, cls in classes():
            out.write(json.dumps(row(name, cls)) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
