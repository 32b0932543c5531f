"""Run as a program: trains a GPT with the smallest plan and prints what memory it took, as one JSON line.

    python -m tests.memory_bounds.peak PRECISION DIRECTORY

Memory is anonymous and shared memory of the process (RssAnon + RssShmem), sampled by a thread. The baseline is taken
after imports and after a tiny run of everything that is used later, so that lazily loaded code is in it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from tests.faults.support import streamed
from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, make_trainer

BATCH, SEQ, WIDTH, LAYERS, VOCAB = 2, 64, 768, 8, 2048
SAMPLE_S = 0.001


class Sampler(threading.Thread):
    """Keeps the largest value seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_nbytes = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            self.peak_nbytes = max(self.peak_nbytes, anonymous_nbytes())
            time.sleep(SAMPLE_S)

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self.peak_nbytes


def anonymous_nbytes() -> int:
    """RssAnon + RssShmem of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


class Built(Module):
    """The model is made in `configure_model`, so that it is never in memory."""

    def __init__(self, width: int, layers: int, vocab: int) -> None:
        super().__init__(torch.nn.Identity(), schedule=False)
        self._size = (width, layers, vocab)

    def configure_model(self) -> None:
        width, layers, vocab = self._size
        if isinstance(self.net, torch.nn.Identity):
            self.net = GPT(vocab=vocab, width=width, layers=layers, seq=SEQ)


def train(root: str, precision: str, width: int, layers: int, vocab: int) -> Any:
    """Three steps; returns the strategy."""
    module = Built(width, layers, vocab)
    options: dict[str, Any] = {"max_steps": 3, "precision": precision}
    trainer = make_trainer(Path(root), streamed(nvme_path=root), **options)
    loader = torch.utils.data.DataLoader(Tokens(12, vocab=vocab, seq=SEQ), batch_size=BATCH)
    trainer.fit(module, loader)
    return trainer.strategy


def main(precision: str, root: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(1, verbose=False)
    train(root, precision, 64, 2, 128).session.close()
    baseline = anonymous_nbytes()
    sampler = Sampler()
    sampler.start()
    strategy = train(root, precision, WIDTH, LAYERS, VOCAB)
    peak = sampler.stop()
    plan, units = strategy.session.plan, strategy.session.units
    numel = sum(unit.layout.numel for unit in units)
    strategy.session.close()
    print(json.dumps({"baseline": baseline, "peak": peak, "plan": plan.host_nbytes, "numel": numel}))


if __name__ == "__main__":
    main(*sys.argv[1:])
