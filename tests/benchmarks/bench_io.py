"""Speed of the I/O engines on one disk, interleaved, as one JSON line: GB/s (10^9 bytes) and CPU seconds per GB.

python tests/benchmarks/bench_io.py DIRECTORY [--file-nbytes 2GiB] [--rounds 2] [--block-nbytes 4MiB] [--depth 16]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import resource
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, cast

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io.engine import Engine, File, IOOptions, Transfer
from lightning_ssd.io.select import make_engine
from lightning_ssd.sizes import MiB, parse_nbytes

TRANSFER_NBYTES = 32 * MiB  # what the store asks for at once
NUM_BUFFERS = 4
JOBS = ("write", "read", "mixed")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--file-nbytes", default="2GiB")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--block-nbytes", default=IOOptions().block_nbytes)
    parser.add_argument("--depth", type=int, default=IOOptions().depth)
    parser.add_argument("--engines", nargs="+", default=["uring", "uring+registered", "posix", "python"])
    args = parser.parse_args()
    cells = measure(args)
    result = {
        "benchmark": "io",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "directory": str(args.directory),
        "file_nbytes": parse_nbytes(args.file_nbytes),
        "transfer_nbytes": TRANSFER_NBYTES,
        "num_in_flight": NUM_BUFFERS,
        "block_nbytes": parse_nbytes(args.block_nbytes),
        "depth": args.depth,
        "rounds": args.rounds,
        "engines": cells,
    }
    sys.stdout.write(json.dumps(result) + "\n")


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians over the rounds, per engine and job."""
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in args.engines}
    nbytes = parse_nbytes(args.file_nbytes)
    memory = mmap.mmap(-1, NUM_BUFFERS * TRANSFER_NBYTES)
    memory[:] = os.urandom(MiB) * (len(memory) // MiB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    file = File.create(args.directory / f"bench_io.{os.getpid()}", nbytes, direct=True)
    try:
        fill(file, address)
        for _ in range(args.rounds):
            for job in JOBS:
                for name in args.engines:
                    run_cell(name, job, file, address, args, samples[name])
    finally:
        file.close()
        os.unlink(file.path)
    return {
        name: {key: round(statistics.median(values), 3) for key, values in cell.items()}
        for name, cell in samples.items()
        if cell
    }


def fill(file: File, address: int) -> None:
    """Write the file once: the first write to new space is slower, and is not what is measured."""
    engine = make_engine(IOOptions())
    try:
        move(engine, file, address, "write")
    finally:
        engine.close()


def run_cell(
    name: str, job: str, file: File, address: int, args: argparse.Namespace, samples: dict[str, list[float]]
) -> None:
    """One engine, one job, once over the file; adds to ``samples``."""
    engine_name, _, registered = name.partition("+")
    try:
        engine = make_engine(IOOptions(engine=cast(Any, engine_name), block_nbytes=args.block_nbytes, depth=args.depth))
    except ConfigurationError:
        return
    try:
        if registered and not engine.register_memory(address, NUM_BUFFERS * TRANSFER_NBYTES):
            return
        cpu_s, start_s = used_cpu_s(), time.monotonic()
        move(engine, file, address, job)
        gbps = file.nbytes / (time.monotonic() - start_s) / 1e9
        samples.setdefault(f"{job}_gbps", []).append(gbps)
        samples.setdefault(f"{job}_cpu_s_per_gb", []).append((used_cpu_s() - cpu_s) / file.nbytes * 1e9)
    finally:
        engine.close()


def move(engine: Engine, file: File, address: int, job: str) -> None:
    """Once over the file, ``NUM_BUFFERS`` transfers in flight; "mixed" alternates reads and writes of other halves."""
    in_flight: deque[Transfer] = deque()
    num_transfers = file.nbytes // TRANSFER_NBYTES
    for i in range(num_transfers):
        if len(in_flight) == NUM_BUFFERS:
            in_flight.popleft().wait()
        where = i if job != "mixed" else i // 2 + i % 2 * (num_transfers // 2)
        start = engine.write if job == "write" or (job == "mixed" and i % 2) else engine.read
        buffer = address + i % NUM_BUFFERS * TRANSFER_NBYTES
        in_flight.append(start(file, where * TRANSFER_NBYTES, buffer, TRANSFER_NBYTES))
    while in_flight:
        in_flight.popleft().wait()


def used_cpu_s() -> float:
    """User and system time of this process and its threads, the kernel's on its behalf included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
