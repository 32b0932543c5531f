"""Run as a program: trains one of `shapes.SHAPES` and prints what memory it took, as one JSON line.

    python -m tests.memory_bounds.shape NAME HOST_MEMORY DIRECTORY [STEPS]

Anonymous memory as in `peak`. A run that is refused before its first step says so instead.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_ssd.errors import SSDOffloadError
from tests.faults.support import streamed
from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, make_trainer
from tests.memory_bounds.peak import Sampler, anonymous_nbytes
from tests.memory_bounds.shapes import SHAPES, Rows


def warm_up(root: str) -> None:
    """Load what is loaded on first use."""
    module = Module(GPT(width=16, layers=2), schedule=False)
    trainer = make_trainer(Path(root), streamed(nvme_path=root), max_steps=2, gradient_clip_val=1.0)
    trainer.fit(module, torch.utils.data.DataLoader(Tokens(8), batch_size=4))
    trainer.strategy.session.close()  # type: ignore[attr-defined]


def measured(name: str, host_memory: str, root: str, steps: int) -> dict[str, Any]:
    shape = SHAPES[name]
    warm_up(root)
    baseline = anonymous_nbytes()
    sampler = Sampler()
    sampler.start()
    pl.seed_everything(1, verbose=False)
    batches: Rows = [shape.batch() for _ in range(steps)]
    module = shape.module(shape)
    strategy = streamed(nvme_path=root, host_memory=host_memory, **{"min_unit_numel": 1_000_000, **shape.strategy})
    trainer = make_trainer(Path(root), strategy, max_steps=-1, max_epochs=1, **shape.trainer)
    found: dict[str, Any] = {"shape": name, "host_memory": host_memory}
    try:
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        found["outcome"] = "lives"
    except SSDOffloadError as error:
        found |= {"outcome": "fails" if module.losses else "refused", "error": str(error)}
    peak = sampler.stop()
    session = strategy._session
    plan = None if session is None else session.plan
    found |= {
        "numel": sum(p.numel() for p in module.parameters()),
        "losses": module.losses,
        "plan_nbytes": None if plan is None else plan.host_nbytes,
        "smallest_nbytes": None if plan is None else plan.smallest_nbytes,
        "budget_nbytes": None if session is None else session.settings.budget_nbytes,
        "baseline_nbytes": baseline,
        "peak_nbytes": peak - baseline,
    }
    if session is not None:
        session.close()
    return found


def main(name: str, host_memory: str, root: str, steps: str = "4") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(measured(name, host_memory, root, int(steps))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
