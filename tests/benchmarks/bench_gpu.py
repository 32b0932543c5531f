"""Training on a GPU with a bounded memory, sizes in growing order; a JSON line for each size and system as it ends.

    python -m tests.benchmarks.bench_gpu DIRECTORY [--minutes 30] [--device-memory 24GiB] [--sizes 350m 1.3b ...]
    python -m tests.benchmarks.bench_gpu DIRECTORY --device cpu --sizes tiny      # tries the benchmark itself out

Ours, plain Lightning where its 16 bytes per parameter and activations fit in that memory, and DeepSpeed's ZeRO-Offload
and ZeRO-Infinity where it can be imported. All keep float32 masters: ours and DeepSpeed's beside bf16 parameters, plain
Lightning by bf16-mixed. ``host_memory`` is a quarter of the state, at most 8 GiB, so that every size streams. TFLOPS
are given twice: from 6 operations per parameter and token, and from 8, which counts that each block's forward runs
again. ``floor_s`` is the longest of compute, copies and the disk, each alone; ``sum_s`` is all of them, which a step
without overlap takes. ``trace`` is of a step that is not timed; on a GPU no span of compute is in it, so that its
overlap counts updates alone.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

import torch

from lightning_ssd.memory.limits import available_nbytes
from lightning_ssd.sizes import GiB, MiB, parse_nbytes
from tests.benchmarks.bounds import Rates
from tests.benchmarks.disk import scratch
from tests.benchmarks.gpt import SIZES, VOCAB, numel
from tests.benchmarks.gpu_worker import Job, precision_of
from tests.benchmarks.support import ROOT, emit, facts, say

ORDER = ["350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b"]
DISK_NBYTES_PER_PARAM = 16  # 14 of the state, and generations being written
DISK_MARGIN_NBYTES = 2 * GiB
PLAIN_NBYTES_PER_PARAM = 16  # parameters, gradients and two moments, all of them float32
HOST_NBYTES_PER_PARAM, LEAST_HOST_NBYTES, MOST_HOST_NBYTES = 4, 64 * MiB, 8 * GiB
PEER_HOST_NBYTES_PER_PARAM = 18
GUESSED_S_PER_PARAM = 12e-9  # of the first size, for setup and all steps
Line = dict[str, Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=ORDER)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--device-memory", default="24GiB")
    parser.add_argument("--host-memory", help="default: a quarter of the state, at most 8 GiB")
    parser.add_argument("--batch", type=int, help="default: 8 sequences, 1 on the CPU")
    parser.add_argument("--seq", type=int, help="default: 1024 tokens, 64 on the CPU")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--probe-nbytes", help="default: 1GiB, 64MiB on the CPU")
    parser.add_argument("--out", help="append the lines to this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu tries the benchmark itself out")
    batch, seq, probe_nbytes = (8, 1024, "1GiB") if args.device == "cuda" else (1, 64, "64MiB")
    args.batch, args.seq = args.batch or batch, args.seq or seq
    args.probe_nbytes = args.probe_nbytes or probe_nbytes
    args.directory.mkdir(parents=True, exist_ok=True)
    bench = Bench(args, time.monotonic() + 60 * args.minutes)
    with scratch(args.directory, parse_nbytes(args.probe_nbytes)) as file:
        rates = file.rates()
    bench.rates = Rates(rates["read"], rates["write"])
    systems = ["ours", "plain", "zero-offload", "zero-infinity"]
    if importlib.util.find_spec("deepspeed") is None:
        emit({"benchmark": "gpu", "system": "deepspeed", "left_out": "deepspeed cannot be imported"}, args.out)
        systems = systems[:2]
    for size in sorted(args.sizes, key=numel):
        for system in systems:
            bench.run(size, system)


class Bench:
    """Runs jobs until the time is over."""

    rates: Rates

    def __init__(self, args: argparse.Namespace, deadline: float) -> None:
        self._args = args
        self._deadline = deadline
        self._s_per_param = {"ours": GUESSED_S_PER_PARAM}
        self._ours: Line = {}  # of this size

    def run(self, size: str, system: str) -> None:
        """One size with one system; writes a line, also if it is left out or fails."""
        args, num_params = self._args, numel(size, seq=self._args.seq)
        line: Line = {"benchmark": "gpu", "size": size, "system": system, "num_params": num_params}
        line |= {"batch": args.batch, "seq": args.seq, "precision": precision_of(system), **facts(args.directory)}
        left_s = self._deadline - time.monotonic()
        reason = self._reason_against(system, num_params, left_s)
        if reason is not None:
            say(f"gpu: {size} {system} left out: {reason}")
            return emit({**line, "left_out": reason}, args.out)
        with tempfile.TemporaryDirectory(prefix="bench-gpu-", dir=args.directory) as path:
            job = Job(
                system,
                size,
                args.device,
                args.batch,
                args.seq,
                args.steps,
                path,
                parse_nbytes(args.device_memory),
                args.host_memory or host_nbytes(num_params),
            )
            say(f"gpu: {size} {system}, {left_s:.0f} s left")
            begin = time.monotonic()
            result = run_within(job, left_s)
        if "error" not in result:
            self._s_per_param[system] = (time.monotonic() - begin) / num_params
            result |= self._figures(result, system, num_params)
        if system == "ours":
            self._ours = result
        return emit(line | {"device_memory_nbytes": job.device_nbytes} | result, args.out)

    def _reason_against(self, system: str, num_params: int, left_s: float) -> str | None:
        disk = shutil.disk_usage(self._args.directory).free
        need = DISK_NBYTES_PER_PARAM * num_params + DISK_MARGIN_NBYTES
        if system in ("ours", "zero-infinity") and need > disk:
            return f"it needs {need} bytes of disk, {disk} are free"
        # Logits in bf16 and float32, their log-softmax and gradients take most.
        need = PLAIN_NBYTES_PER_PARAM * num_params + 20 * self._args.batch * self._args.seq * VOCAB
        if system == "plain" and need > parse_nbytes(self._args.device_memory):
            return f"it needs {need} bytes of device memory"
        if system.startswith("zero") and self._args.device == "cpu":
            return "Lightning's DeepSpeed strategy needs CUDA"
        if system == "zero-offload" and PEER_HOST_NBYTES_PER_PARAM * num_params > available_nbytes():
            return "it does not fit in host memory"
        guess_s = self._s_per_param.get(system, self._s_per_param["ours"]) * num_params
        if guess_s > left_s:
            return f"it would take some {guess_s:.0f} s, {left_s:.0f} s are left"
        return None

    def _figures(self, result: Line, system: str, num_params: int) -> Line:
        tokens, step_s = self._args.batch * self._args.seq, result["step_s"]
        found: Line = {
            "tokens_per_s": tokens / step_s,
            "tflops_6p": 6 * num_params * tokens / step_s / 1e12,
            "tflops_8p": 8 * num_params * tokens / step_s / 1e12,
        }
        if system == "plain" and "step_s" in self._ours:
            found["ours_to_plain"] = self._ours["step_s"] / step_s
        elif system.startswith("zero") and "step_s" in self._ours:
            found["speedup_of_ours"] = step_s / self._ours["step_s"]
        elif system == "ours":
            found |= self._overlap(result, num_params)
        return found

    def _overlap(self, result: Line, num_params: int) -> Line:
        found: Line = {"disk_rates": dataclasses.asdict(self.rates)}
        parts = {
            "compute": result["compute_s"],
            "disk": self.rates.disk_s(result["read_nbytes"], result["written_nbytes"]),
        }
        if "to_device_gbps" in result:  # each parameter goes there twice, 2 bytes; its gradient comes back once
            parts["to_device"] = 4 * num_params / result["to_device_gbps"] / 1e9
            parts["to_host"] = 2 * num_params / result["to_host_gbps"] / 1e9
        floor_s, sum_s = max(parts.values()), sum(parts.values())
        found |= {"parts_s": parts, "floor_s": floor_s, "sum_s": sum_s}
        found |= {"ratio_to_floor": result["step_s"] / floor_s, "ratio_to_sum": result["step_s"] / sum_s}
        return found


def host_nbytes(num_params: int) -> int:
    """``host_memory`` by default."""
    return max(LEAST_HOST_NBYTES, min(HOST_NBYTES_PER_PARAM * num_params, MOST_HOST_NBYTES))


def run_within(job: Job, seconds: float) -> Line:
    """Run the job in a process of its own; its JSON line, or what went wrong."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu_worker", json.dumps(dataclasses.asdict(job))]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True
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
        return {"error": f"ended with {process.returncode}: {errors.strip()[-600:]}"}
    found: Line = json.loads(lines[-1])
    return found


if __name__ == "__main__":
    main()
