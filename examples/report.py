"""What a run measured about itself: memory, step times, bytes moved; and the table and the JSON line made of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

GB = 10**9


@dataclass
class MemoryPeak:
    """Largest values seen, in bytes. Anonymous memory is the process's own; file pages the kernel can take back."""

    anonymous_nbytes: int = 0
    file_nbytes: int = 0


class MemorySampler:
    """Samples this process's resident memory from a thread, every ``interval_s``, between ``start`` and ``stop``."""

    def __init__(self, interval_s: float = 0.02) -> None:
        self.peak = MemoryPeak()
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def start(self) -> None:
        """Start sampling."""
        self._thread.start()

    def stop(self) -> MemoryPeak:
        """Stop sampling; the peak of everything seen."""
        self._stop.set()
        self._thread.join()
        return self.peak

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            now = memory_now()
            self.peak.anonymous_nbytes = max(self.peak.anonymous_nbytes, now.anonymous_nbytes)
            self.peak.file_nbytes = max(self.peak.file_nbytes, now.file_nbytes)


def memory_now() -> MemoryPeak:
    """Resident memory at this moment, from ``/proc/self/status`` (RssAnon + RssShmem, and RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    rss = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return MemoryPeak(rss["RssAnon"] + rss["RssShmem"], rss["RssFile"])


@dataclass(frozen=True)
class IoCount:
    """Bytes moved between disk and memory so far."""

    read_nbytes: int
    written_nbytes: int


@dataclass
class StepLog(Callback):
    """Loss, end time and bytes moved so far of every optimizer step. The losses travel in the checkpoint.

    Args:
        count_io: Says how many bytes the strategy has moved since it was set up; None where nothing is moved.
    """

    count_io: Callable[[], IoCount] | None = None
    losses: list[float] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    io: list[IoCount] = field(default_factory=list)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses: list[float] = []
        self._mark()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        if len(self._losses) == trainer.accumulate_grad_batches:
            self.losses.append(statistics.fmean(self._losses))
            self._losses.clear()
            self._mark()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = list(state_dict["losses"])

    def _mark(self) -> None:
        self.times_s.append(time.perf_counter())
        if self.count_io is not None:
            self.io.append(self.count_io())

    @property
    def num_steps(self) -> int:
        """Steps taken by this process."""
        return len(self.times_s) - 1

    def step_s(self) -> float:
        """Mean seconds of a step, without the first one: that is where the order of use is learned."""
        skip = 1 if len(self.times_s) > 2 else 0
        return (self.times_s[-1] - self.times_s[skip]) / (self.num_steps - skip)

    def io_per_step(self) -> IoCount | None:
        """Mean bytes of a step, without the first one; None where nothing is moved."""
        if self.count_io is None:
            return None
        skip = 1 if len(self.io) > 2 else 0
        first, last, num = self.io[skip], self.io[-1], len(self.io) - 1 - skip
        return IoCount(
            (last.read_nbytes - first.read_nbytes) // num, (last.written_nbytes - first.written_nbytes) // num
        )


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: list[float]) -> Mean:
        """Mean of independent ``values``."""
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return cls(statistics.fmean(values), error)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


def machine_facts(store: Path) -> dict[str, Any]:
    """Where the figures come from: processor, memory, the disk under ``store``, versions."""
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    mounts = [line.split()[:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    device, _, fs_type = max((m for m in mounts if store.resolve().is_relative_to(m[1])), key=lambda m: len(m[1]))
    packages = ("torch", "lightning", "transformers", "lightning-ssd")
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "disk": f"{device} ({fs_type})",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


@dataclass(frozen=True)
class Figures:
    """What one run measured."""

    num_params: int
    num_trained_params: int
    logits_nbytes: int  # of one batch, in float32
    tokens_per_step: int
    num_steps: int  # of this process
    step_s: float
    io: IoCount | None  # per step
    losses: list[float]  # one per step from the very first
    held_out: list[tuple[int, list[float]]]  # after so many steps: one loss per sample, the same samples each time
    memory_at_start: MemoryPeak  # after imports, before the model
    memory_peak: MemoryPeak
    checkpoint: Path

    def rows(self) -> dict[str, str]:
        """The figures for people: name and value."""
        (_, first), (_, last) = self.held_out[0], self.held_out[-1]
        num_before = len(self.losses) - self.num_steps
        shown = [f"{loss:.2f}" for loss in self.losses]
        moved = "-" if self.io is None else f"{self.io.read_nbytes / GB:.2f} GB / {self.io.written_nbytes / GB:.2f} GB"
        peak, start = self.memory_peak, self.memory_at_start
        rows = {f"held-out loss after {step} steps": str(Mean.of(losses)) for step, losses in self.held_out}
        rows["fall, sample by sample"] = str(Mean.of([a - b for a, b in zip(first, last, strict=True)]))
        if num_before:
            rows["training loss before the checkpoint"] = " ".join(shown[max(0, num_before - 8) : num_before])
        rows |= {
            "training loss" + (" after resuming" if num_before else ""): " ".join(shown[num_before:][-8:]),
            "step": f"{self.step_s:.2f} s, {self.tokens_per_step / self.step_s:.0f} tokens/s",
            "read / written per step": moved,
            "peak anonymous memory": f"{peak.anonymous_nbytes / GB:.2f} GB"
            f" (of it {start.anonymous_nbytes / GB:.2f} GB interpreter and libraries)",
            "peak file-mapped pages": f"{peak.file_nbytes / GB:.2f} GB (the kernel may take them back)",
            "plain AdamW would need": f"{(4 * self.num_params + 12 * self.num_trained_params) / GB:.2f} GB"
            " (4 B per parameter, 12 more where it is trained)"
            f" + {2 * self.logits_nbytes / GB:.2f} GB (logits and their gradient) + layer activations",
            "checkpoint": str(self.checkpoint),
        }
        return rows


def print_table(rows: dict[str, str]) -> None:
    """Two columns, aligned."""
    width = max(map(len, rows))
    print()
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
    print(flush=True)


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append ``record`` to ``path`` as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(record, default=str) + "\n")
