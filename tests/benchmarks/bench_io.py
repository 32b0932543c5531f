"""Our disk engines beside fio on one file, interleaved, as one JSON line: GB/s (10^9 bytes) and CPU seconds per GB.

    python -m tests.benchmarks.bench_io DIRECTORY [--file-nbytes 2GiB] [--rounds 8] [--block-nbytes 4MiB] [--depth 16]

In a round every contestant does a job once, one after the other, in an order drawn anew: a neighbour, and what the host
keeps of the file, then favour nobody. fio runs with its memory as it is and in huge pages ("+huge"): a device takes a
transfer from scattered small pages in many more requests. A figure is the median over rounds. ``ratio_to_fio`` is the
median of the ratios within a round to the fastest of fio's, by its median in that job.
"""

from __future__ import annotations

import argparse
import random
import subprocess
from pathlib import Path
from typing import Any, cast

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.sizes import parse_nbytes
from tests.benchmarks.disk import JOBS, NUM_BUFFERS, TRANSFER_NBYTES, Cell, Scratch, has_fio, scratch
from tests.benchmarks.support import emit, facts, in_own_session, median, say

FIO = ("fio io_uring+huge", "fio libaio+huge", "fio io_uring", "fio libaio")
WHAT_A_RUN_USES = "uring+registered"
Samples = dict[str, dict[str, list[Cell]]]  # by job and contestant, a cell for each round


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--file-nbytes", default="2GiB")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--block-nbytes", default=IOOptions().block_nbytes)
    parser.add_argument("--depth", type=int, default=IOOptions().depth)
    parser.add_argument("--engines", nargs="+", default=[WHAT_A_RUN_USES, "uring", "posix", "python"])
    parser.add_argument("--out", help="append the line to this file")
    args = parser.parse_args()
    in_own_session()
    contestants = [*args.engines, *(FIO if has_fio() else ())]
    line = {"benchmark": "io", **facts(args.directory), "fio": _fio_version()}
    with scratch(args.directory, parse_nbytes(args.file_nbytes)) as file:
        line |= {"is_direct": file.file.is_direct, "memory_nbytes_huge": file.huge_nbytes()}
        samples = measure(file, contestants, args.rounds, args.block_nbytes, args.depth)
    line |= {
        "file_nbytes": file.nbytes,
        "transfer_nbytes": TRANSFER_NBYTES,
        "num_in_flight": NUM_BUFFERS,
        "block_nbytes": parse_nbytes(args.block_nbytes),
        "depth": args.depth,
        "rounds": args.rounds,
        **summary(samples),
    }
    emit(line, args.out)


def measure(file: Scratch, contestants: list[str], rounds: int, block_nbytes: int | str, depth: int) -> Samples:
    """All cells."""
    samples: Samples = {job: {name: [] for name in contestants} for job in JOBS}
    order = random.Random(0)
    for i in range(rounds):
        say(f"io: round {i + 1} of {rounds}")
        for job in JOBS:
            for name in order.sample(contestants, len(contestants)):
                cell = run_cell(file, name, job, block_nbytes, depth)
                if cell is not None:
                    samples[job][name].append(cell)
    return samples


def run_cell(file: Scratch, name: str, job: str, block_nbytes: int | str, depth: int) -> Cell | None:
    """One contestant, one job, once; None where it does not work here."""
    options = IOOptions(block_nbytes=block_nbytes, depth=depth)
    if name in FIO:
        engine, _, huge = name.removeprefix("fio ").partition("+")
        return file.fio(job, engine, options, huge=bool(huge))
    engine, _, registered = name.partition("+")
    options = IOOptions(engine=cast(Any, engine), block_nbytes=block_nbytes, depth=depth)
    try:
        return file.own(job, options, registered=bool(registered))
    except ConfigurationError:
        return None


def summary(samples: Samples) -> dict[str, Any]:
    """Medians, and our ratio to the better of fio's engines."""
    found: dict[str, Any] = {"ratio_to_fio": {}, "jobs": {}}
    for job, cells in samples.items():
        ran = {name: values for name, values in cells.items() if values}
        gbps = {name: median(cell.gbps for cell in values) for name, values in ran.items()}
        cpu = {name: median(cell.cpu_s_per_gb for cell in values) for name, values in ran.items()}
        found["jobs"][job] = {"gbps": gbps, "cpu_s_per_gb": cpu}
        fio = [name for name in FIO if name in ran]
        if fio and WHAT_A_RUN_USES in ran:
            best = max(fio, key=gbps.__getitem__)
            ratios = [a.gbps / b.gbps for a, b in zip(ran[WHAT_A_RUN_USES], ran[best], strict=True)]
            found["ratio_to_fio"][job] = {"ratio": median(ratios), "of": best, "rounds": ratios}
    return found


def _fio_version() -> str | None:
    return subprocess.run(["fio", "--version"], capture_output=True, text=True).stdout.strip() if has_fio() else None


if __name__ == "__main__":
    main()
