"""One timed training job in a process of its own: prints the times of its steps as one JSON line.

    python -m tests.benchmarks.step_worker '{"system": "ours", "size": "tiny", "path": "/nvme", ...}'

A step is timed from its begin to the next one's: what a step leaves to be done under the next forward then counts once,
in steady state. So the last step is not counted, nor the first ``warmup``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_ssd
from lightning_ssd.io.engine import IOOptions, IOStats
from lightning_ssd.io.select import make_engine
from lightning_ssd.kernels import api as kernels
from lightning_ssd.kernels.options import AdamOptions
from tests.benchmarks.disk import scratch
from tests.benchmarks.gpt import Module, batches, numel
from tests.benchmarks.support import median, plan_of
from tests.helpers.training import make_trainer

CHUNK_NUMEL = 1 << 22
NUM_CHUNKS = 8  # together beyond any cache
PROBE_NBYTES = 1 << 30


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        system: "ours", "plain", "plain-recompute" (torch checkpointing of each block), or "kernel" (the update alone).
        size: Of the model.
        precision: Lightning's.
        batch: Sequences in a batch.
        seq: Tokens in a sequence.
        steps: Steps, the last of which is not counted.
        warmup: First steps that are not counted.
        clip: ``gradient_clip_val``.
        threads: Of torch; the kernels keep their own number.
        path: ``nvme_path``.
        options: Further settings of the strategy.
        beside: Bytes that a thread reads and writes in each forward and backward, whatever these do.
        timed: Rates of the simulated device that takes time; the job is `timed_worker`'s then.
    """

    system: str
    size: str
    precision: str
    batch: int
    seq: int
    steps: int
    warmup: int
    threads: int
    path: str
    clip: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    beside: tuple[float, float] | None = None
    timed: dict[str, float] | None = None


class Clock(pl.Callback):
    """Overrides no hook that would make gradients visible, since that would change what is timed.

    ``waits``: each mark is when the device has done what was queued, so that phases add up.
    """

    def __init__(self, stats: Callable[[], IOStats] | None = None, *, waits: bool = False) -> None:
        self.stats = stats
        self.waits = waits
        self.marks: dict[str, list[float]] = {}
        self.moved: dict[str, list[IOStats]] = {}

    def mark(self, name: str) -> None:
        if self.waits:
            torch.cuda.synchronize()
        if self.stats is not None:
            self.moved.setdefault(name, []).append(self.stats())
        self.marks.setdefault(name, []).append(time.perf_counter())

    def on_train_batch_start(self, *_: Any) -> None:
        self.mark("begin")

    def on_before_backward(self, *_: Any) -> None:
        self.mark("backward")


class PlainClock(Clock):
    def on_after_backward(self, *_: Any) -> None:
        self.mark("after_backward")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.mark("update")

    def on_train_batch_end(self, *_: Any) -> None:
        self.mark("end")


class DiskBeside(pl.Callback):
    """In each forward and backward a thread moves bytes; it is waited for before the update begins."""

    def __init__(self, executor: Executor, move: Callable[[], None]) -> None:
        self._executor = executor
        self._move = move
        self._moving: Future[None]

    def on_train_batch_start(self, *_: Any) -> None:
        self._moving = self._executor.submit(self._move)

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._moving.result()


@contextmanager
def beside(job: Job) -> Iterator[list[pl.Callback]]:
    """Callbacks that keep the disk busy, if the job asks for it."""
    if job.beside is None:
        yield []
        return
    with (
        scratch(job.path, PROBE_NBYTES) as file,
        closing(make_engine(IOOptions())) as engine,
        ThreadPoolExecutor(1) as executor,
    ):
        yield [DiskBeside(executor, functools.partial(file.exchange, engine, *job.beside))]


def main() -> None:
    warnings.simplefilter("ignore")
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    result = time_kernel(job) if job.system == "kernel" else train(job, make_strategy(job))
    sys.stdout.write(json.dumps({"job": dataclasses.asdict(job), **result}) + "\n")


def make_strategy(job: Job) -> Any:
    return lightning_ssd.SSDOffloadStrategy(nvme_path=job.path, **job.options) if job.system == "ours" else "auto"


def train(job: Job, strategy: Any, further: Sequence[pl.Callback] = ()) -> dict[str, Any]:
    clock = Clock(strategy.stats) if job.system == "ours" else PlainClock(waits=job.timed is not None)
    pl.seed_everything(0, verbose=False)
    fused = job.clip is None  # Lightning does not clip for a fused optimizer in mixed precision
    module = Module(job.size, fused=fused, seq=job.seq, recompute=job.system == "plain-recompute")
    with beside(job) as callbacks:
        trainer = make_trainer(
            Path(job.path),
            strategy,
            precision=job.precision,
            gradient_clip_val=job.clip,
            max_steps=job.steps,
            callbacks=[*further, *callbacks, clock],
            accelerator="cpu" if job.timed is None else "gpu",
        )
        trainer.fit(module, batches(job.steps, job.batch, job.seq))
    counted = slice(job.warmup, job.steps - 1)
    begins = clock.marks["begin"]
    steps = [b - a for a, b in itertools.pairwise(begins)][counted]
    result: dict[str, Any] = {"step_s": median(steps), "steps_s": steps, "losses": module.losses, "begins_s": begins}
    result["peak_rss_nbytes"] = _peak_rss_nbytes()
    if job.system == "ours":
        session = strategy.session
        result |= _moved_by_phase(clock, counted)
        result |= {
            "plan": plan_of(session),
            "engine": session.engine.name,
            "first_unit": _first_unit(session),
        }
    else:
        marks = {name: values[counted] for name, values in clock.marks.items()}
        for name, since, until in (
            ("forward_s", "begin", "backward"),
            ("backward_s", "backward", "after_backward"),
            ("update_s", "update", "end"),
        ):
            result[name] = median(b - a for a, b in zip(marks[since], marks[until], strict=True))
        result["compute_s"] = result["step_s"] - result["update_s"]
    return result


def time_kernel(job: Job) -> dict[str, Any]:
    """The update of as many elements as the model has, chunk by chunk, and the check of its gradients."""
    total = numel(job.size, seq=job.seq)
    low = torch.bfloat16 if job.precision == "bf16-true" else torch.float32
    chunks = [[torch.rand(CHUNK_NUMEL) for _ in range(3)] for _ in range(NUM_CHUNKS)]
    grads = [torch.rand(CHUNK_NUMEL).to(low) for _ in range(NUM_CHUNKS)]
    outs = [torch.zeros(CHUNK_NUMEL, dtype=low) for _ in range(NUM_CHUNKS)] if low == torch.bfloat16 else None
    options = AdamOptions(step=10, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, decoupled=True)

    def update(i: int, size: int) -> None:
        param, exp_avg, exp_avg_sq = (t[:size] for t in chunks[i])
        out = None if outs is None else outs[i][:size]
        kernels.adam_(param, grads[i][:size], exp_avg, exp_avg_sq, options, out=out)

    def check(i: int, size: int) -> None:
        kernels.sum_of_squares(grads[i][:size])

    return {"update_s": _over(total, update), "finite_check_s": _over(total, check), "kernel": kernels.describe()}


def _over(total: int, work: Callable[[int, int], None]) -> float:
    """Seconds of ``work`` on ``total`` elements, the median of three."""
    for i in range(NUM_CHUNKS):
        work(i, CHUNK_NUMEL)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for i, at in enumerate(range(0, total, CHUNK_NUMEL)):
            work(i % NUM_CHUNKS, min(CHUNK_NUMEL, total - at))
        times.append(time.perf_counter() - begin)
    return median(times)


def _moved_by_phase(clock: Clock, counted: slice) -> dict[str, float]:
    """Bytes of a step: until backward begins, and from then to the next step's begin."""
    begins, backwards = clock.moved["begin"], clock.moved["backward"]
    found = {}
    for name in ("read_nbytes", "written_nbytes"):
        at_begin, at_backward = ([getattr(s, name) for s in stats] for stats in (begins, backwards))
        steps = list(zip(at_begin[:-1], at_backward[:-1], at_begin[1:], strict=True))[counted]
        found[f"forward_{name}"] = median(b - a for a, b, _ in steps)
        found[f"other_{name}"] = median(c - b for _, b, c in steps)
    return found


def _first_unit(session: Any) -> dict[str, float]:
    """Of the unit that forward needs first, its share of all parameters and of those whose states go to disk."""
    first, kept = session.units[0], session.plan.in_memory_states
    streamed = sum(unit.layout.numel for unit in session.units if unit.name not in kept)
    return {
        "share": first.layout.numel / sum(unit.layout.numel for unit in session.units),
        "written_share": 0.0 if first.name in kept else first.layout.numel / streamed,
    }


def _peak_rss_nbytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
