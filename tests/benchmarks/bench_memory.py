"""Host memory and disk traffic of a GPT that does not fit: one JSON line.

    python tests/benchmarks/bench_memory.py --size 1.3b --precision bf16-true --host-memory 1GiB --path /nvme

Random weights, created in ``configure_model``, batch 1 x 256 tokens, AdamW. Anonymous memory is RssAnon + RssShmem,
sampled every 10 ms, above what the process had before the Trainer was made (interpreter, torch, Lightning). Plain
training would hold weights, gradients and two float32 moments at least.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lightning_ssd
from tests.helpers.models import Block

SIZES = {"124m": (12, 768, 12), "350m": (24, 1024, 16), "1.3b": (24, 2048, 16), "4b": (32, 3072, 24)}
VOCAB, SEQ = 25600, 256


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCAB, width)
        self.pos = nn.Embedding(SEQ, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Module(pl.LightningModule):
    def __init__(self, size: str) -> None:
        super().__init__()
        self.size = size
        self.losses: list[float] = []
        self.began_s: list[float] = []

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = GPT(*SIZES[self.size])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.began_s.append(time.perf_counter())
        loss = F.cross_entropy(self.net(batch[0]).float().view(-1, VOCAB), batch[1].view(-1))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Sampler:
    """Largest anonymous and file-mapped memory of this process, bytes."""

    def __init__(self) -> None:
        self.anonymous = self.mapped = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            anonymous, mapped = memory_now()
            self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)


def memory_now() -> tuple[int, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return (kib["RssAnon"] + kib["RssShmem"]) * 1024, kib["RssFile"] * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="124m")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--host-memory", default="1GiB")
    parser.add_argument("--update", default="auto")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--path", default=None)
    args = parser.parse_args()
    tokens = torch.randint(0, 512, (args.steps, SEQ + 1), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([(row[:-1], row[1:]) for row in tokens], batch_size=1)
    strategy = lightning_ssd.SSDOffloadStrategy(nvme_path=args.path, host_memory=args.host_memory, update=args.update)
    pl.seed_everything(0, verbose=False)
    module = Module(args.size)
    base, _ = memory_now()
    sampler = Sampler()
    begin_s = time.perf_counter()
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        precision=args.precision,
        max_steps=args.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    end_s = time.perf_counter()
    sampler.stop()
    session = strategy.session
    plan = session.plan
    numel = sum(unit.layout.numel for unit in session.units)
    stats = strategy.stats()
    starts = [*module.began_s, end_s]
    line = {
        "benchmark": "memory",
        "size": args.size,
        "numel": numel,
        "precision": args.precision,
        "host_memory": args.host_memory,
        "plan_nbytes": plan.host_nbytes,
        "smallest_plan_nbytes": plan.smallest_nbytes,
        "peak_anonymous_above_base_nbytes": sampler.anonymous - base,
        "peak_mapped_file_nbytes": sampler.mapped,
        "base_anonymous_nbytes": base,
        # logits, their float32 copy, log-softmax and its gradient; a block's saved tensors and gradients
        "activations_estimate_nbytes": SEQ * VOCAB * 14 + SEQ * SIZES[args.size][1] * 4 * 40,
        "plain_at_least_nbytes": numel * (16 if args.precision == "32-true" else 12),
        "setup_s": round(starts[0] - begin_s, 1),
        "step_s": [round(b - a, 2) for a, b in itertools.pairwise(starts)],
        "read_nbytes": stats.read_nbytes,
        "written_nbytes": stats.written_nbytes,
        "losses": [round(loss, 4) for loss in module.losses],
        "engine": session.engine.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
