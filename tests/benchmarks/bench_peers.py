"""Ours beside DeepSpeed ZeRO-Infinity on one training job, interleaved with disk probes; a JSON line for each model.

    python -m tests.benchmarks.bench_peers DIRECTORY --deepspeed-python DS/bin/python --peers ../shared/peers
        [--models 124m 350m 1.3b] [--rounds 3]

The job, the recorder and DeepSpeed's adapter are in the folder ``--peers`` (its README says how to set DeepSpeed up),
ours is in ``tests/benchmarks/peers``. Ours runs twice a round: ``same_memory``, with the budget at which the peak RSS
of the process stays at or below that of DeepSpeed's leanest run so far (after a run above it the budget falls and the
run is made again); and ``small``, with ``host_memory="512MiB"``. Before and after each run fio (else our engine) probes
the disk. ``floor_s`` is the larger of R/r + W/w, from the bytes of the run and the probes around it, and compute alone.

A step of DeepSpeed's is timed from begin to end, one of ours from begin to the next begin, since updates that it leaves
owed are done under the next forward. Speed-ups are of one round; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ssd.io.engine import IOOptions
from lightning_ssd.sizes import MiB, fmt, parse_nbytes
from tests.benchmarks.bounds import Rates
from tests.benchmarks.disk import Scratch, has_fio, scratch
from tests.benchmarks.support import ROOT, emit, facts, in_own_session, median, run_json, say

ADAPTERS = Path(__file__).resolve().parent / "peers"
SMALL = "512MiB"
# What runs, of the README of the peers; pipelined at 350m as at 124m, for it is faster there too.
DEEPSPEED: dict[str, dict[str, dict[str, str]]] = {
    "tiny": {"no_pipeline": {"buffers": "16", "obuffers": "8", "sub_group": "2e7", "pipe": "0"}},
    "124m": {
        "no_pipeline": {"buffers": "16", "obuffers": "8", "sub_group": "2e7", "pipe": "0"},
        "pipeline": {"buffers": "16", "obuffers": "16", "sub_group": "2e7"},
    },
    "350m": {
        "no_pipeline": {"buffers": "16", "obuffers": "8", "sub_group": "2.7e7", "pipe": "0"},
        "pipeline": {"buffers": "16", "obuffers": "16", "sub_group": "2.7e7"},
    },
    "1.3b": {
        "no_pipeline": {
            "buffers": "10",
            "obuffers": "8",
            "sub_group": "5.3e7",
            "pipe": "0",
            "prefetch": "0",
            "max_live": "5e7",
        }
    },
}
STEPS = {"tiny": 4, "124m": 8, "350m": 8, "1.3b": 4}
LOSS_STEPS = 8  # at least so many in the first round
DISK_NBYTES_PER_PARAM = 20  # DeepSpeed's files
PARAMS = {"tiny": 7e6, "124m": 124e6, "350m": 355e6, "1.3b": 1.32e9}
IN_MEMORY_UP_TO = 4e8  # parameters; the plain job takes 20 bytes for each
MARGIN_NBYTES = 48 * MiB
TRIES = 4
KEPT = (  # of a run's own line
    "step_s_median",
    "begin_to_begin_s_median",
    "step_cpu_s_median",
    "setup_s",
    "peak_rss_mb",
    "train_peak_rss_mb",
    "disk_read_mb_per_step",
    "disk_write_mb_per_step",
    "read_nbytes_per_step",
    "written_nbytes_per_step",
    "plan",
    "forwards_per_block",
    "losses",
    "opt",
    "engine",
    "kernels",
    "timed",
    "error",
)
Line = dict[str, Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--deepspeed-python", default=os.environ.get("DEEPSPEED_PYTHON"))
    parser.add_argument("--peers", type=Path, default=Path(os.environ.get("PEERS", "../shared/peers")))
    parser.add_argument("--models", nargs="+", choices=DEEPSPEED, default=["124m", "350m", "1.3b"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--probe-nbytes", default="1GiB")
    parser.add_argument("--out", help="append the lines to this file")
    args = parser.parse_args()
    deepspeed = require_peers(args.deepspeed_python, args.peers, args.directory, args.models)
    in_own_session()
    with (
        scratch(args.directory, parse_nbytes(args.probe_nbytes)) as file,
        tempfile.TemporaryDirectory(prefix="bench-peers-", dir=args.directory) as swap_root,
    ):
        for model in args.models:
            line = {"benchmark": "peers", "model": model, **facts(args.directory), "deepspeed": deepspeed}
            line |= {"rounds": args.rounds, "threads": args.threads}
            bench = Bench(model, file, swap_root, args.deepspeed_python, args.peers.resolve(), args.threads)
            for i in range(args.rounds):
                say(f"peers: {model}, round {i + 1} of {args.rounds}")
                bench.round(i)
            emit(line | bench.line(), args.out)


def require_peers(python: str | None, peers: Path, directory: Path, models: list[str]) -> str:
    """DeepSpeed's version; ends the program with what is missing."""
    if not (peers / "workload.py").is_file():
        raise SystemExit(f"{peers} has no workload.py: give the folder of the peers with --peers, or PEERS")
    if python is None or shutil.which(python) is None:
        raise SystemExit(f"no Python with DeepSpeed at {python}: give one with --deepspeed-python, or DEEPSPEED_PYTHON")
    code = "from importlib.metadata import version; print(version('deepspeed'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if found.returncode != 0:
        raise SystemExit(f"{python} has no DeepSpeed: see {peers / 'README.md'}")
    need, free = max(PARAMS[m] for m in models) * DISK_NBYTES_PER_PARAM, shutil.disk_usage(directory).free
    if need > free:
        raise SystemExit(
            f"{directory} has {fmt(free)} free, {max(models, key=PARAMS.__getitem__)} needs {fmt(int(need))}"
        )
    return found.stdout.strip()


@dataclass
class Bench:
    """One model's runs.

    Attributes:
        model: Its name.
        file: For probes.
        swap_root: Where every system puts its state.
        deepspeed_python: DeepSpeed's Python.
        peers: The folder with `workload`.
        threads: Of each process.
        compute: Compute alone, by whether activations are kept or recomputed.
        runs: What ran, by round and system.
        plain: The job in memory, if it fits.
        budget_nbytes: ``host_memory`` of ``same_memory``; 0 before the first round.
    """

    model: str
    file: Scratch
    swap_root: str
    deepspeed_python: str
    peers: Path
    threads: int
    compute: dict[str, list[float]] = field(default_factory=dict)
    runs: list[dict[str, Line]] = field(default_factory=list)
    plain: Line | None = None
    budget_nbytes: int = 0
    _probe: dict[str, float] | None = None

    def round(self, number: int) -> None:
        """Every system once, in an order drawn anew, except that the first round needs DeepSpeed's peak, then ours."""
        steps = max(STEPS[self.model], LOSS_STEPS if number == 0 and self.model != "tiny" else 0)
        self.runs.append({})
        for name, extra in (("recompute", []), ("keep", ["--no-ac"])):
            line = self._run(sys.executable, ADAPTERS / "compute.py", 5, {}, *extra)
            self.compute.setdefault(name, []).append(line["step_s_median"])
        if number == 0 and PARAMS[self.model] <= IN_MEMORY_UP_TO:
            self.plain = self._run(sys.executable, self.peers / "inmemory.py", steps, {})
        variants = [f"deepspeed_{name}" for name in DEEPSPEED[self.model]]
        systems = [*variants, "small", "same_memory"]
        if number > 0:
            random.Random(number).shuffle(systems)
        for system in systems:
            if system == "same_memory":
                self._run_same_memory(steps + 1)
            elif system == "small":
                self._run_ours(system, steps + 1, SMALL)
            else:
                options = DEEPSPEED[self.model][system.removeprefix("deepspeed_")]
                script = self.peers / "deepspeed_infinity.py"
                self._record(system, self.deepspeed_python, script, steps, options)

    def line(self) -> Line:
        """What all rounds say."""
        systems = sorted({system for runs in self.runs for system, run in runs.items() if "error" not in run})
        by_system = {s: [runs[s] for runs in self.runs if "error" not in runs.get(s, {"error": ""})] for s in systems}
        deepspeed = [s for s in systems if s.startswith("deepspeed_")]
        ours = [s for s in systems if s not in deepspeed]
        leanest_mb = min((r["train_peak_rss_mb"] for s in deepspeed for r in by_system[s]), default=None)
        return {
            "probe": f"{self._tool()}, {IOOptions().block_nbytes} blocks, depth {IOOptions().depth}",
            "file_nbytes_of_probe": self.file.nbytes,
            "compute_s": {name: median(values) for name, values in self.compute.items()},
            "in_memory_step_s": self.plain and self.plain["step_s_median"],
            "step_s": {s: median(r["step_s"] for r in by_system[s]) for s in systems},
            "ratio_to_floor": {s: median(r["step_s"] / r["floor_s"] for r in by_system[s]) for s in systems},
            "peak_rss_mb": {s: max(r["train_peak_rss_mb"] for r in by_system[s]) for s in systems},
            "deepspeed_leanest_peak_rss_mb": leanest_mb,
            "same_memory_is_within": all(
                r["train_peak_rss_mb"] <= leanest_mb for r in by_system.get("same_memory", []) if leanest_mb is not None
            ),
            "speedup": {s: {d: self._speedup(s, d) for d in deepspeed} for s in ours},
            "loss_difference": {s: self._loss_difference(by_system[s]) for s in systems},
            "losses_are_compared_with": "inmemory" if self.plain else "deepspeed_no_pipeline",
            "runs": self.runs,
        }

    # -- runs ----------------------------------------------------------------------------------------------------

    def _run_same_memory(self, steps: int) -> None:
        peaks = [r["train_peak_rss_mb"] for runs in self.runs for s, r in runs.items() if s.startswith("deepspeed_")]
        if not peaks:
            return say("peers: DeepSpeed did not run, so there is no memory to stay below")
        allowed = int(min(peaks) * MiB)
        for _ in range(TRIES):
            if self.budget_nbytes == 0:  # what the process takes beyond its plan is known from the other run
                small = self.runs[0]["small"]
                beyond = small["train_peak_rss_mb"] * MiB - small["plan"]["host_nbytes"]
                self.budget_nbytes = int(allowed - beyond) - MARGIN_NBYTES
            run = self._run_ours("same_memory", steps, f"{max(self.budget_nbytes // MiB, 1)}MiB")
            excess = run["train_peak_rss_mb"] * MiB - allowed
            if excess <= 0:
                return None
            say(f"peers: peak RSS {run['train_peak_rss_mb']} MB is {excess / MiB:.0f} MiB above DeepSpeed's; once more")
            self.budget_nbytes -= int(excess) + MARGIN_NBYTES
        raise SystemExit(f"no host_memory keeps our peak RSS below DeepSpeed's {fmt(allowed)}")

    def _run_ours(self, system: str, steps: int, host_memory: str) -> Line:
        options = {"host_memory": host_memory}
        run = self._record(system, sys.executable, ADAPTERS / "ssd_offload.py", steps, options)
        if "error" in run:
            raise SystemExit(f"ours failed with host_memory={host_memory}: {run['error']}")
        return run

    def _record(self, system: str, python: str, script: Path, steps: int, options: dict[str, str]) -> Line:
        """Run between two probes; adds the floor of the bytes moved."""
        before = self._probe or self.file.rates(self._tool())
        result = self._run(python, script, steps, options)
        self._probe = after = self.file.rates(self._tool())
        run = {key: result[key] for key in KEPT if key in result}
        self.runs[-1][system] = run
        if "error" in run:
            say(f"peers: {system} failed: {run['error']}")
            return run
        rates = {f"{name}_gbps": (before[name] + after[name]) / 2 for name in after}
        run["rates"] = rates
        run["step_s"] = run.get("begin_to_begin_s_median", run["step_s_median"])
        read = run.get("read_nbytes_per_step", run["disk_read_mb_per_step"] * 1e6)
        written = run.get("written_nbytes_per_step", run["disk_write_mb_per_step"] * 1e6)
        run["disk_s"] = Rates(rates["read_gbps"], rates["write_gbps"]).disk_s(read, written)
        keep, recompute = self.compute["keep"][-1], self.compute["recompute"][-1]
        run["compute_s"] = keep + (run.get("forwards_per_block", 2) - 1) * (recompute - keep)
        run["floor_s"] = max(run["disk_s"], run["compute_s"])
        say(f"peers: {system}: {run['step_s']} s a step, floor {run['floor_s']:.2f}, {run['train_peak_rss_mb']} MB")
        return run

    def _run(self, python: str, script: Path, steps: int, options: dict[str, str], *extra: str) -> Line:
        before = [path for path in (os.environ.get("PYTHONPATH"), str(self.peers), str(ROOT)) if path]
        env = {
            "PYTHONPATH": os.pathsep.join(before),
            "SWAP_ROOT": self.swap_root,
            "OMP_NUM_THREADS": str(self.threads),
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",  # DeepSpeed looks for ninja
        }
        command = [python, str(script), "--model", self.model, "--steps", str(steps), "--threads", str(self.threads)]
        command += [word for key, value in options.items() for word in ("--opt", f"{key}={value}")]
        say(f"peers: {script.name} {options}")
        return run_json([*command, *extra], env=env)

    @staticmethod
    def _tool() -> str:
        return "fio" if has_fio() else "own"

    # -- figures -------------------------------------------------------------------------------------------------

    def _speedup(self, ours: str, deepspeed: str) -> float:
        pairs = [(runs[ours], runs[deepspeed]) for runs in self.runs if "step_s" in runs.get(deepspeed, {})]
        return median(b["step_s"] / a["step_s"] for a, b in pairs)

    def _loss_difference(self, runs: list[Line]) -> float | None:
        reference = self.plain or self.runs[0].get("deepspeed_no_pipeline", {})
        if "losses" not in reference:
            return None
        return max(abs(a - b) for run in runs for a, b in zip(run["losses"], reference["losses"], strict=False))


if __name__ == "__main__":
    main()
