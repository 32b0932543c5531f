"""Whole steps: ours beside plain Lightning, and against the bound of the pieces measured alone; a JSON line each.

    python -m tests.benchmarks.bench_step DIRECTORY [--size 124m] [--rounds 3] [--configs fits disk balanced compute]

``fits``: everything has room in ``host_memory``; ours beside plain Lightning, which keeps its activations too.
The others: a small budget, and as many tokens a step as make the disk, neither, or compute the slowest piece, chosen by
a short run of each. Each round runs, in processes of their own, plain Lightning, plain with checkpointing (its forward
and backward are the compute pieces), the update kernel alone, and ours with overlap, without, and gated by clipping,
with a disk probe by our engine before and after each; at last plain with checkpointing while a thread moves the bytes
of ours, since disk and compute slow each other down where they share cores and memory. Efficiencies are of one round;
figures are medians over rounds.

    python -m tests.benchmarks.bench_step DIRECTORY --device timed [--size 1.3b] [--batch 4] [--seq 1024]

Compute is elsewhere, as on a GPU: on the simulated device, which spends time by what kernels and copies cost and takes
no core. Tokens are given, and its speed is chosen such that the disk, neither, or compute is the slowest piece. The
disk is paced to a share of its own measured rates. Values are zeros.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from lightning_ssd.io.engine import IOOptions
from lightning_ssd.sizes import parse_nbytes
from tests.benchmarks import bounds
from tests.benchmarks.bounds import FirstUnit, Moved, Pieces, Rates
from tests.benchmarks.disk import Scratch, scratch
from tests.benchmarks.gpt import SEQ, SIZES, numel
from tests.benchmarks.step_worker import Job
from tests.benchmarks.support import emit, facts, in_own_session, median, run_json, say

COMPUTE_PER_DISK = {"disk": 0.35, "balanced": 1.0, "compute": 2.5}  # aimed at, seconds per second
CONFIGS = ["fits", *COMPUTE_PER_DISK]
OURS: dict[str, dict[str, Any]] = {  # what differs from the base job
    "overlap": {},
    "overlap_off": {"options": {"overlap": "off"}},
    "gated": {"clip": 1.0},
}
BOUNDED = ("overlap", "gated")
# Bytes that an update reads for each byte that it writes: master and two moments in, these and a bf16 copy out.
READ_PER_WRITTEN = {"bf16-true": 12 / 14}
MAX_BATCH = 32
# The timed device: the proportions of a large GPU, whose speed is scaled; PCIe 4.
OPERATIONS, MEMORY, PINNED, PAGEABLE, LAUNCH_S = 400e12, 2.5e12, 25e9, 8e9, 4e-6
FIRST_SCALE = 0.05
Line = dict[str, Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="124m")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--configs", nargs="+", choices=["fits", *COMPUTE_PER_DISK], default=["fits", *COMPUTE_PER_DISK]
    )
    parser.add_argument("--host-memory", default="512MiB", help="budget of all but fits")
    parser.add_argument("--fits-memory", default="8GiB", help="budget of fits")
    parser.add_argument("--fits-tokens", type=int, default=1024)
    parser.add_argument("--probe-nbytes", default="1GiB")
    parser.add_argument("--device", choices=["cpu", "timed"], default="cpu")
    parser.add_argument("--batch", type=int, default=4, help="timed: sequences in a step")
    parser.add_argument("--seq", type=int, default=1024, help="timed: tokens in a sequence")
    parser.add_argument(
        "--disk-share", type=float, default=0.6, help="timed: of its measured rates, that it is paced to"
    )
    parser.add_argument("--gpu-memory", default="24GiB", help="timed: of the device")
    parser.add_argument("--device-memory", default="auto", help="timed: the strategy's setting")
    parser.add_argument("--out", help="append the lines to this file")
    args = parser.parse_args()
    in_own_session()
    if args.device == "timed":
        return on_timed_device(args)
    base = Job("ours", args.size, args.precision, 1, SEQ, args.steps, args.warmup, args.threads, str(args.directory))
    with scratch(args.directory, parse_nbytes(args.probe_nbytes)) as file:
        for config in args.configs:
            line = {"benchmark": "step", "config": config, **facts(args.directory), "rounds": args.rounds}
            if config == "fits":
                job = with_tokens(with_options(base, host_memory=args.fits_memory), args.fits_tokens)
                line |= compare_with_plain(job, args.rounds)
            else:
                job = with_options(base, host_memory=args.host_memory)
                line |= compare_with_bound(job, file, config, args.rounds)
            emit(line, args.out)


def compare_with_plain(job: Job, rounds: int) -> Line:
    """Ours and plain Lightning in turn."""
    found: dict[str, list[Line]] = {"ours": [], "plain": []}
    for i in range(rounds):
        for system in ("ours", "plain") if i % 2 else ("plain", "ours"):
            found[system].append(run(job, system=system))
    pairs = list(zip(found["ours"], found["plain"], strict=True))
    return {
        "job": dataclasses.asdict(job),
        "ratio_to_plain": median(ours["step_s"] / plain["step_s"] for ours, plain in pairs),
        "step_s": {system: [line["step_s"] for line in lines] for system, lines in found.items()},
        "plan": found["ours"][0]["plan"],
        "peak_rss_nbytes": {system: max(line["peak_rss_nbytes"] for line in lines) for system, lines in found.items()},
        "moved": dataclasses.asdict(moved_by(found["ours"][-1])),
        "loss_difference": max(loss_difference(ours, plain) for ours, plain in pairs),
    }


def compare_with_bound(job: Job, file: Scratch, config: str, rounds: int) -> Line:
    """Ours, in its ways, beside the pieces."""
    job = choose_tokens(job, file, COMPUTE_PER_DISK[config])
    samples = []
    for i in range(rounds):
        say(f"step: {config}, round {i + 1} of {rounds}")
        samples.append(one_round(job, file, i))
    efficiency, strict = (
        {way: [s["ours"][way][bound] / s["ours"][way]["step_s"] for s in samples] for way in BOUNDED}
        for bound in ("bound_s", "strict_bound_s")
    )
    steps = {way: median(s["ours"][way]["step_s"] for s in samples) for way in OURS}
    return {
        "job": dataclasses.asdict(job),
        "block_nbytes": parse_nbytes(IOOptions().block_nbytes),
        "depth": IOOptions().depth,
        "formulas": bounds.FORMULAS,
        "efficiency": {way: median(values) for way, values in efficiency.items()},
        "strict_efficiency": {way: median(values) for way, values in strict.items()},
        "beside_efficiency": median(
            s["ours"]["overlap"]["beside_bound_s"] / s["ours"]["overlap"]["step_s"] for s in samples
        ),
        "efficiency_rounds": efficiency,
        "step_s": steps | {"plain": median(s["plain"]["step_s"] for s in samples)},
        "ratio_to_plain": median(s["ours"]["overlap"]["step_s"] / s["plain"]["step_s"] for s in samples),
        "off_to_overlap": median(s["ours"]["overlap_off"]["step_s"] / s["ours"]["overlap"]["step_s"] for s in samples),
        "loss_difference": max(s["loss_difference"] for s in samples),
        "samples": samples,
    }


def one_round(job: Job, file: Scratch, number: int) -> Line:
    """Every piece and every way once."""
    plain, alone = run(job, system="plain"), run(job, system="plain-recompute")
    kernel = run(job, system="kernel")
    pieces = Pieces(alone["forward_s"], alone["backward_s"], alone["compute_s"], kernel["update_s"])
    ways = list(OURS)
    ways = ways[number % len(ways) :] + ways[: number % len(ways)]
    probe = file.rates()
    ours: dict[str, Line] = {}
    differences: list[float] = []
    for way in ways:
        result = run(job, **OURS[way])
        before, probe = probe, file.rates()
        rates = {f"{name}_gbps": (before[name] + probe[name]) / 2 for name in probe}
        ours[way] = against_bound(result, way, rates, pieces, job.precision)
        if way != "gated":  # plain does not clip here
            differences.append(loss_difference(result, plain))
    moved = Moved(**ours["overlap"]["moved"])
    both = run(job, system="plain-recompute", beside=(moved.read_nbytes, moved.written_nbytes))
    ours["overlap"]["beside_bound_s"] = both["compute_s"] + ours["overlap"]["first_update_s"]
    return {
        "loss_difference": max(differences),
        "pieces": dataclasses.asdict(pieces),
        "finite_check_s": kernel["finite_check_s"],
        "kernel": kernel["kernel"],
        "plain": {key: plain[key] for key in ("step_s", "forward_s", "backward_s", "update_s", "peak_rss_nbytes")},
        "ours": ours,
    }


def against_bound(result: Line, way: str, rates: dict[str, float], pieces: Pieces, precision: str) -> Line:
    """What of a run of ours goes into the line, with its bound."""
    moved = moved_by(result)
    alone = Rates(rates["read_gbps"], rates["write_gbps"])
    first = FirstUnit(**result["first_unit"], read_per_written=READ_PER_WRITTEN.get(precision, 1.0))
    first_s = bounds.first_update_s(moved, alone, pieces.update_s, first)
    gated_s = bounds.gated_bound_s(moved, alone, pieces)
    return {
        "step_s": result["step_s"],
        "steps_s": result["steps_s"],
        "bound_s": gated_s if way == "gated" else bounds.ungated_bound_s(moved, alone, pieces, first_s),
        "strict_bound_s": gated_s if way == "gated" else bounds.strict_bound_s(moved, alone, pieces, first_s),
        "disk_s": alone.disk_s(moved.read_nbytes, moved.written_nbytes),
        "first_update_s": first_s,
        "first_unit": dataclasses.asdict(first),
        "rates": rates,
        "moved": dataclasses.asdict(moved),
        "plan": result["plan"],
        "peak_rss_nbytes": result["peak_rss_nbytes"],
        "engine": result["engine"],
    }


def on_timed_device(args: argparse.Namespace) -> None:
    """A line for each configuration but fits, with compute on the simulated device that takes time."""
    with scratch(args.directory, parse_nbytes(args.probe_nbytes)) as file:
        measured = file.rates()
    rates = {f"{name}_gbps": args.disk_share * measured[name] for name in ("read", "write")}
    settings = {"host_memory": args.host_memory, "device_memory": args.device_memory}
    timed = functools.partial(timed_rates, rates, parse_nbytes(args.gpu_memory))
    job = Job("ours", args.size, "bf16-true", args.batch, args.seq, args.steps, args.warmup, args.threads, "", None)
    job = dataclasses.replace(job, path=str(args.directory), options=settings, timed=timed(FIRST_SCALE))
    short = dataclasses.replace(job, steps=4, warmup=2)
    kernel, compute_s = run(job, system="kernel"), run(short, system="plain-recompute")["compute_s"]
    moved = moved_by(run(short, timed=timed(1.0)))
    disk_s = Rates(**rates).disk_s(moved.read_nbytes, moved.written_nbytes)
    for config in args.configs:
        if config == "fits":
            continue
        scale = FIRST_SCALE * compute_s / (COMPUTE_PER_DISK[config] * disk_s)
        line = {"benchmark": "step_timed", "config": config, **facts(args.directory), "disk_share": args.disk_share}
        line |= {"num_params": numel(args.size, seq=args.seq), "formulas": bounds.FORMULAS, "disk_rates": measured}
        line |= one_timed_round(dataclasses.replace(job, timed=timed(scale)), kernel, rates)
        emit(line, args.out)


def timed_rates(disk: dict[str, float], device_nbytes: int, scale: float) -> dict[str, float]:
    """Of a device so many times as fast as a large GPU, beside a disk of these rates."""
    speed = {"operations": scale * OPERATIONS, "memory": scale * MEMORY}
    return {**speed, "pinned": PINNED, "pageable": PAGEABLE, "launch": LAUNCH_S, "device_nbytes": device_nbytes, **disk}


def one_timed_round(job: Job, kernel: Line, rates: dict[str, float]) -> Line:
    """Both ways against the pieces."""
    alone = run(job, system="plain-recompute")
    pieces = Pieces(alone["forward_s"], alone["backward_s"], alone["compute_s"], kernel["update_s"])
    ours = {}
    for way in BOUNDED:
        result = run(job, **OURS[way])
        told = {key: result[key] for key in ("engines", "host_waits", "num_counted", "num_steps", "trace")}
        ours[way] = against_bound(result, way, rates, pieces, job.precision) | told
    return {
        "job": dataclasses.asdict(job),
        "pieces": dataclasses.asdict(pieces),
        "efficiency": {way: ours[way]["bound_s"] / ours[way]["step_s"] for way in BOUNDED},
        "strict_efficiency": {way: ours[way]["strict_bound_s"] / ours[way]["step_s"] for way in BOUNDED},
        "step_s": {way: ours[way]["step_s"] for way in BOUNDED} | {"plain-recompute": alone["step_s"]},
        "ours": ours,
    }


def choose_tokens(job: Job, file: Scratch, compute_per_disk: float) -> Job:
    """The job with as many tokens a step as make compute that multiple of disk time, by short runs of both."""
    short = dataclasses.replace(job, steps=5)
    few, many = 64, 512
    few_s, many_s = (run(with_tokens(short, n), system="plain-recompute")["compute_s"] for n in (few, many))
    rates, moved = file.rates(), moved_by(run(with_tokens(short, few)))
    disk_s = Rates(rates["read"], rates["write"]).disk_s(moved.read_nbytes, moved.written_nbytes)
    per_token_s = (many_s - few_s) / (many - few)
    tokens = few + (compute_per_disk * disk_s - few_s) / per_token_s
    say(f"step: compute {few_s:.2f}, {many_s:.2f} s at {few}, {many} tokens, disk {disk_s:.2f} s: {tokens:.0f} tokens")
    return with_tokens(job, tokens)


def with_tokens(job: Job, tokens: float) -> Job:
    """The job with about so many tokens a step: one short sequence, or several of full length."""
    if tokens < SEQ:
        return dataclasses.replace(job, batch=1, seq=max(round(tokens / 32), 1) * 32)
    return dataclasses.replace(job, batch=min(round(tokens / SEQ), MAX_BATCH), seq=SEQ)


def with_options(job: Job, **options: Any) -> Job:
    """The job with further settings of the strategy."""
    return dataclasses.replace(job, options={**job.options, **options})


def run(job: Job, *, options: Line | None = None, **changes: Any) -> Line:
    """Run the job, changed, in a process of its own."""
    job = dataclasses.replace(with_options(job, **(options or {})), **changes)
    say(f"step: {job.system}, {job.batch} x {job.seq} tokens, clip {job.clip}, {job.options}")
    worker = "step_worker" if job.timed is None else "timed_worker"
    return run_json([sys.executable, "-m", f"tests.benchmarks.{worker}", json.dumps(dataclasses.asdict(job))])


def moved_by(result: Line) -> Moved:
    """Bytes of a step of a run of ours."""
    return Moved(**{field.name: result[field.name] for field in dataclasses.fields(Moved)})


def loss_difference(a: Line, b: Line) -> float:
    """Largest difference of the losses of two runs."""
    return max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))


if __name__ == "__main__":
    main()
