"""The peers' job without any update: forward, recompute and backward on bf16 weights in memory. Its time is the compute
that no offloading system can go below. Run as `ssd_offload.py` beside it."""

from __future__ import annotations

from typing import Any

import torch
import workload


def train(wl: Any, rec: Any) -> None:
    """The interface of `workload`; the loss stays what it is for start values."""
    rec.imported()
    model = wl.build_model(torch.bfloat16)
    for i in range(wl.steps):
        x, y = wl.batch(i)
        rec.begin(i)
        loss = wl.loss(model(x), y)
        loss.backward()
        model.zero_grad(set_to_none=True)
        rec.end(i, loss.item())


if __name__ == "__main__":
    workload.main("compute_alone", train)
