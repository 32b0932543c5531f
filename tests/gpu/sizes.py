"""Training with a bounded device memory, sizes in growing order, ours beside others; a line for each as it ends.

Ours; plain Lightning where its 16 bytes per parameter and activations fit in that memory; torch's FSDP2 with
``CPUOffloadPolicy``; DeepSpeed's ZeRO-Offload and ZeRO-Infinity where it can be imported. All keep float32 masters.
``host_memory`` is a quarter of the state, at most 8 GiB, so that every size streams. TFLOPS are given twice: from 6
operations per parameter and token, and from 8, which counts that each block's forward runs again. ``floor_s`` is the
longest of compute, copies, the disk, each alone, for the bytes that the step moved (those of activations among them);
``sum_s`` is all of them, which a step without overlap takes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.device import IS_SIMULATED

from lightning_ssd.memory.limits import available_nbytes  # isort: skip
from lightning_ssd.sizes import GiB, MiB, fmt  # isort: skip
from tests.benchmarks.bounds import Rates  # isort: skip
from tests.benchmarks.gpt import VOCAB, numel  # isort: skip
from tests.benchmarks.support import ROOT, say  # isort: skip
from tests.gpu.guess import Guess  # isort: skip
from tests.gpu.worker import Job, precision_of  # isort: skip

DISK_NBYTES_PER_PARAM = 16  # 14 of the state, and generations being written
DISK_MARGIN_NBYTES = 2 * GiB
PLAIN_NBYTES_PER_PARAM = 16  # parameters, gradients and two moments, all of them float32
HOST_NBYTES_PER_PARAM, LEAST_HOST_NBYTES, MOST_HOST_NBYTES = 4, 64 * MiB, 8 * GiB
PEER_HOST_NBYTES_PER_PARAM = 18
SYSTEMS = ("ours", "plain", "fsdp2", "zero-offload", "zero-infinity")
Line = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Of all jobs.

    Attributes:
        directory: Where state goes.
        device_nbytes: What a process may take of the device's memory.
        seq: Tokens in a sequence.
        steps: Of a job.
        deadline_s: When all is over, of `time.monotonic`.
    """

    directory: Path
    device_nbytes: int
    seq: int
    steps: int
    deadline_s: float


class Sizes:
    """Runs jobs until the time is over.

    Args:
        settings: Of all jobs.
        machine: What the machine does alone; see `tests.gpu.pieces.machine`.
        emit: Writes a line.
    """

    def __init__(self, settings: Settings, machine: Line, emit: Callable[[Line], None]) -> None:
        self._settings = settings
        self._machine = machine
        self._emit = emit
        self._rates = Rates(machine["disk_gbps"]["read"], machine["disk_gbps"]["write"])
        # A step reads and writes the whole state; before the first step it is written once.
        per_param = (settings.steps + 1) * self._rates.disk_s(14, 14)
        self._guesses = {system: Guess(per_param) for system in SYSTEMS}
        self._ours: Line = {}  # the last of ours

    def run(self, size: str, system: str, batch: int) -> bool:
        """One job; emits a line, also if it is left out or fails. Returns False if it failed."""
        num_params = numel(size, seq=self._settings.seq)
        line: Line = {"part": "sizes", "size": size, "system": system, "num_params": num_params}
        line |= {"batch": batch, "seq": self._settings.seq, "precision": precision_of(system)}
        reason = self._reason_against(system, num_params, batch)
        if reason is not None:
            say(f"gpu: {size} {system} x {batch} left out: {reason}")
            self._emit({**line, "left_out": reason})
            return True
        begin = time.monotonic()
        result = self._result(size, system, batch, num_params)
        took_s = time.monotonic() - begin
        if "error" not in result:
            self._guesses[system].add(num_params, took_s)
            result |= self._figures(result, system, num_params, batch)
        if system == "ours":
            self._ours = result
        self._emit({**line, "took_s": took_s, **result})
        return "error" not in result

    def _result(self, size: str, system: str, batch: int, num_params: int) -> Line:
        settings = self._settings
        left_s = settings.deadline_s - time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gpu-", dir=settings.directory) as path:
            job = Job(
                system=system,
                size=size,
                batch=batch,
                seq=settings.seq,
                steps=settings.steps,
                path=path,
                device_nbytes=settings.device_nbytes,
                host_memory=host_nbytes(num_params),
            )
            say(f"gpu: {size} {system} x {batch}, {left_s:.0f} s left")
            return run_within(job, left_s)

    def _reason_against(self, system: str, num_params: int, batch: int) -> str | None:
        disk = shutil.disk_usage(self._settings.directory).free
        need = DISK_NBYTES_PER_PARAM * num_params + DISK_MARGIN_NBYTES
        if system in ("ours", "zero-infinity") and need > disk:
            return f"it needs {fmt(need)} of disk, {fmt(disk)} are free"
        # Logits in bf16 and float32, their log-softmax and gradients take most.
        need = PLAIN_NBYTES_PER_PARAM * num_params + 20 * batch * self._settings.seq * VOCAB
        if system == "plain" and need > self._settings.device_nbytes:
            return f"it needs {fmt(need)} of device memory, {fmt(self._settings.device_nbytes)} are allowed"
        if system.startswith("zero") and (IS_SIMULATED or importlib.util.find_spec("deepspeed") is None):
            return "deepspeed is not installed" if not IS_SIMULATED else "DeepSpeed needs CUDA"
        need = PEER_HOST_NBYTES_PER_PARAM * num_params
        if system in ("zero-offload", "fsdp2") and need > available_nbytes():
            return f"it needs {fmt(need)} of host memory"
        guess_s, left_s = self._guesses[system].seconds(num_params), self._settings.deadline_s - time.monotonic()
        if guess_s > left_s:
            return f"it would take some {guess_s:.0f} s, {left_s:.0f} s are left"
        return None

    def _figures(self, result: Line, system: str, num_params: int, batch: int) -> Line:
        tokens, step_s = batch * self._settings.seq, result["step_s"]
        found: Line = {
            "tokens_per_s": tokens / step_s,
            "tflops_6p": 6 * num_params * tokens / step_s / 1e12,
            "tflops_8p": 8 * num_params * tokens / step_s / 1e12,
        }
        found |= {f"share_of_peak_{n}p": found[f"tflops_{n}p"] / self._machine["matmul_tflops"] for n in (6, 8)}
        if system == "ours":
            return found | self._bounds(result)
        ours = self._ours.get("step_s")
        return found | ({"ours_to_this": ours / step_s} if ours else {})

    def _bounds(self, result: Line) -> Line:
        profile, copies = result["profile"], self._machine["copies_gbps"]
        parts = {"compute": result["compute_s"]}
        parts["disk"] = self._rates.disk_s(result["read_nbytes"], result["written_nbytes"])
        for way in ("to_device", "to_host"):
            parts[way] = profile[f"{way}_nbytes"] / copies[f"{way}_pinned"] / 1e9
        floor_s, sum_s = max(parts.values()), sum(parts.values())
        ratios = {"overlap": floor_s / result["step_s"], "ratio_to_sum": result["step_s"] / sum_s}
        return {"parts_s": parts, "floor_s": floor_s, "sum_s": sum_s, **ratios}


def host_nbytes(num_params: int) -> int:
    """``host_memory`` by default."""
    return max(LEAST_HOST_NBYTES, min(HOST_NBYTES_PER_PARAM * num_params, MOST_HOST_NBYTES))


def run_within(job: Job, seconds: float, **environment: str) -> Line:
    """Run the job in a process of its own; its JSON line, or what went wrong; in any case the end of its errors."""
    command = [sys.executable, "-m", "tests.gpu.worker", json.dumps(dataclasses.asdict(job))]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if process.returncode != 0 or not lines:
        return {"error": f"ended with {process.returncode}: {errors.strip()[-3000:]}"}
    found: Line = json.loads(lines[-1])
    return found
