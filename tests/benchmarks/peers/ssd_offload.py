"""Our adapter for the peers' `workload.py` (a folder outside the project, on PYTHONPATH): `Trainer` with the strategy.

    PYTHONPATH=PEERS SWAP_ROOT=/nvme python tests/benchmarks/peers/ssd_offload.py --model 124m --opt host_memory=512MiB

``--opt KEY=VALUE`` is any setting of the strategy. Updates that a step leaves owed are done under the next forward, so
steps are timed from begin to begin (``begin_to_begin_s``, ``*_nbytes_per_step``); `workload`'s own ``step_s_*`` and
``disk_*`` go from begin to end and miss what is done after a step's end.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
import warnings
from typing import Any

import torch
import workload

WARMUP = 2  # as `workload`


def train(wl: Any, rec: Any) -> None:
    """The interface of `workload`."""
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl

    import lightning_ssd
    from lightning_ssd.kernels import api as kernels
    from tests.benchmarks.support import plan_of

    rec.imported()

    class Module(pl.LightningModule):
        def configure_model(self) -> None:
            if not hasattr(self, "net"):  # the strategy recomputes by itself
                self.net = wl.build_model(torch.bfloat16, checkpoint=None)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return wl.loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            decay = wl.weight_decay
            return torch.optim.AdamW(self.parameters(), lr=wl.lr, betas=wl.betas, eps=wl.eps, weight_decay=decay)

    begins: list[float] = []
    moved: list[Any] = []
    num_forwards = itertools.count()
    forward = workload.Block.forward

    def counted_forward(block: Any, x: torch.Tensor) -> torch.Tensor:
        next(num_forwards)
        return forward(block, x)

    workload.Block.forward = counted_forward

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            rec.begin(index)
            begins.append(time.perf_counter())
            moved.append(strategy.stats())

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            rec.end(index, outputs["loss"])

    strategy = lightning_ssd.SSDOffloadStrategy(nvme_path=wl.swap_dir, **{k: _value(v) for k, v in wl.opt.items()})
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        precision="bf16-true",
        max_steps=wl.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    )
    data = [tuple(t[0] for t in wl.batch(i)) for i in range(wl.steps)]
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=wl.batch_size))
    steps = [b - a for a, b in itertools.pairwise(begins)]
    counted = slice(min(WARMUP, len(steps) - 1), None)
    rec.note("timed", "begin to begin: what a step leaves owed is done under the next forward and counted there")
    rec.note("begin_to_begin_s", [round(s, 3) for s in steps])
    rec.note("begin_to_begin_s_median", round(statistics.median(steps[counted]), 3))
    for name in ("read_nbytes", "written_nbytes"):
        deltas = [getattr(b, name) - getattr(a, name) for a, b in itertools.pairwise(moved)]
        rec.note(f"{name}_per_step", statistics.median(deltas[counted]))
    # 1 where backward finds what forward kept, 2 where every block runs its forward again.
    rec.note("forwards_per_block", next(num_forwards) / wl.steps / wl.layers)
    session = strategy.session
    rec.note("plan", plan_of(session))
    rec.note("engine", session.engine.name)
    rec.note("kernels", kernels.describe())


def _value(text: str) -> Any:
    """``1`` and ``true`` as Python has them, all else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    workload.main("lightning_ssd", train)
