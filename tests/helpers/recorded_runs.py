"""Ten short trainings whose every bit is recorded, to hold two commits together.

    python tests/helpers/recorded_runs.py RECORD.json              # with the package that this interpreter finds
    python tests/helpers/recorded_runs.py --compare PYTHON PYTHON  # two environments; exit status 1 if unequal

It stands alone and uses only what users may use, so that it runs on commits that are older than itself.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH, STEPS = 48, 6


class Block(nn.Module):
    """Two matrices, a norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the block makes of ``x``."""
        y: Tensor = x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))
        return y


class Model(pl.LightningModule):
    """A few blocks between an embedding and a head, tied if asked for."""

    def __init__(
        self,
        optimizer: Callable[..., Any],
        *,
        is_tied: bool = False,
        num_frozen: int = 0,
        is_manual: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 64, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight
        self.blocks[:num_frozen].requires_grad_(False)
        self.automatic_optimization = not is_manual
        self._optimizer = optimizer
        self.losses: list[str] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of predicting the next token."""
        (tokens,) = batch
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(float(loss).hex())
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        """As given."""
        return self._optimizer([p for p in self.parameters() if p.requires_grad])


def adamw(params: Any) -> Any:
    """The optimizer of most runs."""
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def sgd(params: Any) -> Any:
    """One with a single state."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


RUNS: dict[str, dict[str, Any]] = {
    "recomputed, least memory": {"strategy": {"host_memory": "min", "activations": "recompute"}},
    "kept activations, least memory": {"strategy": {"host_memory": "min", "activations": "keep"}},
    "everything in memory": {},
    "bf16-mixed": {"strategy": {"host_memory": "min"}, "trainer": {"precision": "bf16-mixed"}},
    "bf16-true": {"strategy": {"host_memory": "min"}, "trainer": {"precision": "bf16-true"}},
    "clipped, accumulated": {
        "strategy": {"host_memory": "min"},
        "trainer": {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
    },
    "tied": {"strategy": {"host_memory": "min"}, "model": {"is_tied": True}},
    "partly frozen": {"strategy": {"host_memory": "min"}, "model": {"num_frozen": 2}},
    "manual optimization": {"strategy": {"host_memory": "min"}, "model": {"is_manual": True}},
    "momentum, resumed": {"strategy": {"host_memory": "min"}, "optimizer": sgd, "resumes": True},
}


def record(name: str, folder: Path) -> dict[str, Any]:
    """Train one of `RUNS`; its losses as hexadecimal floats, and digests of weights and optimizer state."""
    from lightning_ssd import SSDOffloadStrategy

    run = RUNS[name]
    data = torch.randint(0, 64, (STEPS * 2, 9), generator=torch.Generator().manual_seed(1))
    losses: list[str] = []
    checkpoint = None
    for steps in (STEPS // 2, STEPS) if run.get("resumes") else (STEPS,):
        pl.seed_everything(7, verbose=False)
        model = Model(run.get("optimizer", adamw), **run.get("model", {}))
        trainer = pl.Trainer(
            accelerator="cpu",
            strategy=SSDOffloadStrategy(nvme_path=str(folder), **run.get("strategy", {})),
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **run.get("trainer", {}),
        )
        trainer.fit(model, DataLoader(TensorDataset(data), batch_size=2), ckpt_path=checkpoint)
        losses += model.losses
        checkpoint = str(folder / f"{steps}.ckpt")
        trainer.save_checkpoint(checkpoint)
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return {"losses": losses, "weights": digest(state), "optimizer": digest(trainer.optimizers[0].state_dict())}


def digest(value: Any) -> str:
    """SHA-256 of nested tensors and numbers, in order."""
    total = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            total.update(f"{item.dtype}{tuple(item.shape)}".encode())
            total.update(item.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                add(str(key))
                add(item[key])
        elif isinstance(item, (list, tuple)):
            for each in item:
                add(each)
        else:
            total.update(repr(item).encode())

    add(value)
    return total.hexdigest()[:16]


def record_all() -> dict[str, Any]:
    """Each of `RUNS`, in order."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="recorded-runs-") as folder:
        found = {}
        for number, name in enumerate(RUNS):
            own = Path(folder) / str(number)
            own.mkdir()
            found[name] = record(name, own)
    return found


def compare(pythons: list[str]) -> int:
    """Record with each interpreter, in its own working directory's package, and print what differs."""
    records = []
    for python in pythons:
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            subprocess.run([python, __file__, out.name], check=True, capture_output=True)
            records.append(json.loads(Path(out.name).read_text()))
    unequal = [name for name in RUNS if records[0][name] != records[1][name]]
    for name in RUNS:
        first, second = (found[name] for found in records)
        verdict = "equal" if first == second else ", ".join(k for k in first if first[k] != second[k]) + " differ"
        print(f"{name:32} {len(first['losses']):2} losses, weights {first['weights']}: {verdict}")
    return 1 if unequal else 0


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        sys.exit(compare(sys.argv[2:4]))
    Path(sys.argv[1]).write_text(json.dumps(record_all(), indent=1))
