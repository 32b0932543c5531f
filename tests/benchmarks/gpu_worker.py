"""One timed training job on a device, in a process of its own: prints what it took as one JSON line.

    python -m tests.benchmarks.gpu_worker '{"system": "ours", "size": "350m", "device": "cuda", ...}'

A step is timed from its begin to the next one's, the device being done with all before; so updates that a step leaves
owed count once. The last step is not counted, nor the first, nor the last but one, which is traced.
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

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import lightning_ssd
from lightning_ssd.io.engine import IOStats
from lightning_ssd.trace.summary import Summary, summarize
from tests.benchmarks.bench_memory import sampled
from tests.benchmarks.gpt import SIZES, VOCAB, Module, batches
from tests.benchmarks.support import median, plan_of
from tests.helpers.models import Block
from tests.helpers.training import make_trainer

PROBE_NBYTES = 1 << 28
LOW = torch.bfloat16


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        system: "ours", "plain" (Lightning, all on the device, blocks recomputed), "zero-offload" or "zero-infinity".
        size: Of the model.
        device: "cuda" or "cpu".
        batch: Sequences in a batch.
        seq: Tokens in a sequence.
        steps: Steps; the first and the last two are not counted.
        path: Where state goes.
        device_nbytes: What the process may take of the GPU's memory.
        host_memory: Setting of the strategy.
    """

    system: str
    size: str
    device: str
    batch: int
    seq: int
    steps: int
    path: str
    device_nbytes: int
    host_memory: int | str = "auto"


class Clock(pl.Callback):
    """Overrides no hook that would make gradients visible, since that would change what is timed."""

    def __init__(self, strategy: Any, traced_step: int) -> None:
        self._strategy = strategy if hasattr(strategy, "stats") else None
        self._traced_step = traced_step
        self.begins: list[float] = []
        self.moved: list[IOStats] = []
        self.trace: Summary | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.begins.append(time.perf_counter())
        if self._strategy is None:
            return
        self.moved.append(self._strategy.stats())
        trace = self._strategy.session.trace
        if trace.is_on:
            trace.stop()
            self.trace = summarize(dataclasses.replace(trace.collect(), num_steps=1))
        elif len(self.begins) == self._traced_step + 1:
            trace.start()


def precision_of(system: str) -> str:
    """Lightning's, with float32 masters."""
    return "bf16-mixed" if system == "plain" else "bf16-true"


def main() -> None:
    warnings.simplefilter("ignore")
    job = Job(**json.loads(sys.argv[1]))
    result: dict[str, Any] = {}
    if job.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(job.device_nbytes / total, 1.0))
        result["device"] = torch.cuda.get_device_name(0)
        result["device_total_nbytes"] = total
    if job.system == "ours":
        result |= pieces(job)
        if job.device == "cuda":
            torch.cuda.empty_cache()  # of what the pieces took
    result |= train(job)
    sys.stdout.write(json.dumps({"job": dataclasses.asdict(job), **result}) + "\n")


def train(job: Job) -> dict[str, Any]:
    """The job, by Lightning."""
    begin = time.perf_counter()
    strategy = make_strategy(job)
    clock = Clock(strategy, job.steps - 2)
    module = make_module(job)
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(
        Path(job.path),
        strategy,
        accelerator="gpu" if job.device == "cuda" else "cpu",
        precision=precision_of(job.system),
        max_steps=job.steps,
        callbacks=[clock],
    )
    with quick_init(), sampled() as peak:
        trainer.fit(module, batches(job.steps, job.batch, job.seq))
    counted = slice(1, -1)  # of the pairs of begins, the last of which is the traced step
    steps = [b - a for a, b in itertools.pairwise(clock.begins)][counted]
    found: dict[str, Any] = {
        "step_s": median(steps),
        "steps_s": steps,
        "losses": module.losses,
        "setup_s": clock.begins[0] - begin,
        **peak,
    }
    if job.device == "cuda":
        found["peak_device_nbytes"] = torch.cuda.max_memory_allocated()
        found["peak_device_reserved_nbytes"] = torch.cuda.max_memory_reserved()
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


# -- pieces, each alone ----------------------------------------------------------------------------------------------


def pieces(job: Job) -> dict[str, Any]:
    """Compute of a step with its parameters on the device, and rates of copies, GB/s."""
    device = torch.device(job.device)
    found = {"compute_s": compute_alone(job, device)}
    if device.type == "cuda":
        on_device = torch.empty(PROBE_NBYTES, dtype=torch.uint8, device=device)
        host = torch.empty(PROBE_NBYTES, dtype=torch.uint8, pin_memory=True)
        to_s = seconds(lambda: on_device.copy_(host, non_blocking=True), device)
        from_s = seconds(lambda: host.copy_(on_device, non_blocking=True), device)
        found |= {"to_device_gbps": PROBE_NBYTES / to_s / 1e9, "to_host_gbps": PROBE_NBYTES / from_s / 1e9}
    return found


def compute_alone(job: Job, device: torch.device) -> float:
    layers, width, heads = SIZES[job.size]
    block = Block(width, heads).to(device, LOW)
    head = nn.Linear(width, VOCAB, bias=False).to(device, LOW)
    x = torch.randn(job.batch, job.seq, width, device=device, dtype=LOW, requires_grad=True)
    forward_s = seconds(lambda: block(x), device)
    both_s = seconds(lambda: block(x).sum().backward(), device)
    head_s = seconds(lambda: head(x).float().sum().backward(), device)
    return layers * (forward_s + both_s) + head_s


def seconds(work: Any, device: torch.device) -> float:
    """Of one call, the median of five after two that do not count."""
    times = []
    for _ in range(7):
        wait(device)
        begin = time.perf_counter()
        result: Tensor | None = work()
        wait(device)
        times.append(time.perf_counter() - begin)
        del result
    return median(times[2:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
