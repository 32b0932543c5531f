"""A job of `step_worker` on the simulated device that takes time, beside a paced disk: compute takes no core.

    python -m tests.benchmarks.timed_worker '{"system": "ours", ..., "timed": {"operations": 1e12, ...}}'

Values are zeros: only times are right. Results have, beside `step_worker`'s: how busy each engine of the device was in
the steps that count, the longest pauses of compute, why and how often the host waited, and a summary of a traced step.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import warnings
from contextlib import ExitStack
from typing import Any

if __name__ == "__main__":  # before torch
    os.environ["SIMULATED_CUDA_NBYTES"] = str(json.loads(sys.argv[1])["timed"]["device_nbytes"])

from tests.simulated_cuda.device import Rates, core, takes_time

import lightning.pytorch as pl  # isort: skip  # after the device: it imports torch
import torch  # isort: skip
from lightning_ssd.trace.summary import summarize  # isort: skip
from tests.benchmarks import bounds, step_worker  # isort: skip
from tests.gpu.worker import quick_init  # isort: skip
from tests.benchmarks.paced import paced  # isort: skip
from tests.simulated_cuda.waits import HostWaits  # isort: skip

ENGINES = ("compute", "to_device", "to_host")
NUM_PAUSES = 8


class Traced(pl.Callback):
    """Traces the last step that does not count."""

    def __init__(self, strategy: Any, step: int) -> None:
        self._strategy = strategy
        self._step = step
        self._num_begun = 0
        self.summary: dict[str, Any] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        trace = self._strategy.session.trace
        if self._num_begun == self._step:
            trace.start()
        elif trace.is_on:
            trace.stop()
            summary = summarize(dataclasses.replace(trace.collect(), num_steps=1)).to_json()
            self.summary = {key: summary[key] for key in ("wall_s", "waits_s", "disk_busy_s", "limit")}
        self._num_begun += 1


def main() -> None:
    """Run the job."""
    warnings.simplefilter("ignore")
    job = step_worker.Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    if job.system == "kernel":
        result = step_worker.time_kernel(job)
    else:
        with ExitStack() as stack:
            timed = job.timed or {}
            stack.enter_context(takes_time(Rates(*(timed[name] for name in Rates._fields)), has_values=False))
            stack.enter_context(paced(bounds.Rates(timed["read_gbps"], timed["write_gbps"])))
            stack.enter_context(quick_init())
            result = train(job)
    sys.stdout.write(json.dumps({"job": dataclasses.asdict(job), **result}) + "\n")


def train(job: step_worker.Job) -> dict[str, Any]:
    strategy = step_worker.make_strategy(job)
    traced = Traced(strategy, job.warmup - 1)
    with HostWaits() as waits:
        result = step_worker.train(job, strategy, [traced] if job.system == "ours" else [])
    begins = result["begins_s"][job.warmup : job.steps]
    counted = max(len(begins) - 1, 1)
    return result | {
        "engines": busy(begins[0], begins[-1]),
        "host_waits": {f"{why}: {place}": number for (why, place), number in waits.found.most_common(20)},
        "num_steps": job.steps,
        "trace": traced.summary,
        "num_counted": counted,
    }


def busy(begin: float, end: float) -> dict[str, Any]:
    """Seconds of a window in which each engine of the device worked, and when compute paused for longest."""
    found: dict[str, Any] = {"window_s": end - begin}
    spans = [span for span in core.take_spans() if span.end > begin and span.begin < end]
    for number, name in enumerate(ENGINES):
        own = [span for span in spans if span.engine == number]
        found[f"{name}_s"] = sum(min(span.end, end) - max(span.begin, begin) for span in own)
        found[f"{name}_nbytes"] = sum(span.nbytes for span in own)
    compute = sorted((span.begin, span.end, span.name) for span in spans if span.engine == 0)
    pauses = sorted(((b[0] - a[1], a[2], b[2], a[1] - begin) for a, b in itertools.pairwise(compute)), reverse=True)
    names = ("s", "after", "before", "at_s")
    found["pauses"] = [dict(zip(names, pause, strict=True)) for pause in pauses[:NUM_PAUSES]]
    return found


if __name__ == "__main__":
    main()
