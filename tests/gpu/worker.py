"""One timed training job on a GPU, in a process of its own: prints what it took as one JSON line.

    python -m tests.gpu.worker '{"system": "ours", "size": "350m", ...}'

A step is timed from its begin to the next one's, the device being done with all before; so updates that a step leaves
owed count once. The first step is not counted, nor the last three: a profiler starts, the next is profiled and traced,
and the last has no end.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.device import working

import lightning.pytorch as pl  # isort: skip  # after the device: it imports torch
import torch  # isort: skip
from torch import nn  # isort: skip

import lightning_ssd  # isort: skip
from lightning_ssd.io.engine import IOStats  # isort: skip
from lightning_ssd.trace.summary import Summary, summarize  # isort: skip
from tests.benchmarks.bench_memory import sampled  # isort: skip
from tests.benchmarks.gpt import SIZES, VOCAB, Module, batches  # isort: skip
from tests.benchmarks.support import median, plan_of  # isort: skip
from tests.gpu.fsdp import train_by_fsdp  # isort: skip
from tests.gpu.pieces import LOW, seconds  # isort: skip
from tests.gpu.profile import Profile  # isort: skip
from tests.helpers.models import Block  # isort: skip
from tests.helpers.training import make_trainer  # isort: skip

NUM_LAST = 3  # steps that are not counted: the profiler's start, the profiled one, and the last


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        system: "ours", "plain" (Lightning, all on the device, blocks recomputed), "fsdp2" (torch's, with
            ``CPUOffloadPolicy``), "zero-offload" or "zero-infinity" (DeepSpeed).
        size: Of the model.
        batch: Sequences in a batch.
        seq: Tokens in a sequence.
        steps: Steps, of which the first and the last `NUM_LAST` are not counted.
        path: Where state goes.
        device_nbytes: What the process may take of the GPU's memory.
        host_memory: Setting of the strategy.
    """

    system: str
    size: str
    batch: int
    seq: int
    steps: int
    path: str
    device_nbytes: int
    host_memory: int | str = "auto"


class Clock(pl.Callback):
    """Overrides no hook that would make gradients visible, since that would change what is timed."""

    def __init__(self, strategy: Any, steps: int) -> None:
        self._strategy = strategy if hasattr(strategy, "stats") else None
        self._profiled = steps - 2
        self._profile: Profile
        self.begins: list[float] = []
        self.moved: list[IOStats] = []
        self.trace: Summary | None = None
        self.profile: dict[str, Any] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        """A step begins, when the device is done with those before."""
        torch.cuda.synchronize()
        step = len(self.begins)
        if step == self._profiled + 1:
            self.profile = self._profile.end()
        self._trace(step)
        self.begins.append(time.perf_counter())
        if self._strategy is not None:
            self.moved.append(self._strategy.stats())
        if step == self._profiled - 1:
            self._profile = Profile()
        elif step == self._profiled:
            self._profile.begin()

    def _trace(self, step: int) -> None:
        if self._strategy is None:
            return
        trace = self._strategy.session.trace
        if trace.is_on:
            trace.stop()
            self.trace = summarize(dataclasses.replace(trace.collect(), num_steps=1))
        elif step == self._profiled:
            trace.start()


def precision_of(system: str) -> str:
    """Lightning's, with float32 masters."""
    return "bf16-mixed" if system in ("plain", "fsdp2") else "bf16-true"


def main() -> None:
    """Run the job."""
    warnings.simplefilter("ignore")
    job = Job(**json.loads(sys.argv[1]))
    with working():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(job.device_nbytes / total, 1.0))
        result: dict[str, Any] = {"device": torch.cuda.get_device_name(0), "device_total_nbytes": total}
        if job.system == "ours":
            result["compute_s"] = compute_alone(job)
            torch.cuda.empty_cache()  # of what that took
        torch.cuda.reset_peak_memory_stats()
        with sampled() as peak, quick_init():
            result |= train_by_fsdp(job) if job.system == "fsdp2" else train(job)
        result["peak_host_nbytes"] = peak["base_anonymous_nbytes"] + peak["peak_anonymous_above_base_nbytes"]
        result["peak_device_nbytes"] = torch.cuda.max_memory_allocated()
        result["peak_device_reserved_nbytes"] = torch.cuda.max_memory_reserved()
    sys.stdout.write(json.dumps({"job": dataclasses.asdict(job), **result}) + "\n")


def train(job: Job) -> dict[str, Any]:
    """The job, by Lightning."""
    begin = time.perf_counter()
    strategy = make_strategy(job)
    clock = Clock(strategy, job.steps)
    module = make_module(job)
    trainer = make_trainer(
        Path(job.path),
        strategy,
        accelerator="gpu",
        precision=precision_of(job.system),
        max_steps=job.steps,
        callbacks=[clock],
    )
    trainer.fit(module, batches(job.steps, job.batch, job.seq))
    counted = slice(1, job.steps - NUM_LAST)  # of the pairs of begins
    steps = [b - a for a, b in itertools.pairwise(clock.begins)][counted]
    found: dict[str, Any] = {
        "step_s": median(steps),
        "steps_s": steps,
        "losses": module.losses,
        "setup_s": clock.begins[0] - begin,
        "profile": clock.profile,
    }
    if clock.moved:
        found |= disk_use(list(itertools.pairwise(clock.moved))[counted])
        found |= {"plan": plan_of(strategy.session), "engine": strategy.session.engine.name}
    if clock.trace is not None:
        trace = clock.trace.to_json()
        found["trace"] = {key: trace[key] for key in ("wall_s", "overlap", "disk_busy_s", "waits_s", "limit")}
        found["trace"]["update_busy_s"] = trace["lanes"]["update"]["busy_s"]
    return found


def disk_use(steps: list[tuple[IOStats, IOStats]]) -> dict[str, Any]:
    """Bytes of a step, and rates while any transfer was in flight, GB/s; steps by what was moved at begin and end."""
    found: dict[str, Any] = {}
    for name, busy in (("read", "read_busy_s"), ("written", "write_busy_s")):
        nbytes = median(getattr(b, f"{name}_nbytes") - getattr(a, f"{name}_nbytes") for a, b in steps)
        busy_s = median(getattr(b, busy) - getattr(a, busy) for a, b in steps)
        found |= {f"{name}_nbytes": nbytes, busy: busy_s, f"{name}_gbps": nbytes / busy_s / 1e9 if busy_s else None}
    return found


def make_strategy(job: Job) -> Any:
    if job.system == "ours":
        return lightning_ssd.SSDOffloadStrategy(
            nvme_path=job.path, host_memory=job.host_memory, activations="recompute"
        )
    if job.system == "plain":
        return "auto"
    options: dict[str, Any] = {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
    if job.system == "zero-infinity":
        options |= {"remote_device": "nvme", "offload_params_device": "nvme", "offload_optimizer_device": "nvme"}
        options |= {"nvme_path": job.path}
    return pl.strategies.DeepSpeedStrategy(**options)


def make_module(job: Job) -> Module:
    pl.seed_everything(0, verbose=False)
    module = Module(job.size, fused=job.system == "plain", seq=job.seq, recompute=job.system != "ours")
    if job.system.startswith("zero"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        module.configure_optimizers = lambda: DeepSpeedCPUAdam(module.parameters(), lr=1e-4)  # type: ignore[method-assign]
    return module


@contextmanager
def quick_init() -> Iterator[None]:
    """Weights are copies of a little noise: drawing billions of numbers takes minutes on one core."""
    noise = torch.randn(1 << 20) * 0.02
    before = {cls: cls.reset_parameters for cls in (nn.Linear, nn.Embedding)}

    def fill(module: nn.Module) -> None:
        with torch.no_grad():
            for param in module.parameters(recurse=False):
                flat = param.view(-1)
                for piece in flat.split(noise.numel()):
                    piece.copy_(noise[: piece.numel()])

    for cls in before:
        cls.reset_parameters = fill  # type: ignore[assignment]
    try:
        yield
    finally:
        for cls, reset in before.items():
            cls.reset_parameters = reset  # type: ignore[method-assign]


def compute_alone(job: Job) -> float:
    """Seconds of a step's compute with its parameters on the device."""
    layers, width, heads = SIZES[job.size]
    device = torch.device("cuda")
    block = Block(width, heads).to(device, LOW)
    head = nn.Linear(width, VOCAB, bias=False).to(device, LOW)
    x = torch.randn(job.batch, job.seq, width, device=device, dtype=LOW, requires_grad=True)
    forward_s = seconds(lambda: block(x))
    both_s = seconds(lambda: block(x).sum().backward())
    head_s = seconds(lambda: head(x).float().sum().backward())
    return layers * (forward_s + both_s) + head_s


if __name__ == "__main__":
    main()
