"""Runs of every shape in a control group with a memory limit: a JSON line for each shape and budget.

    python -m tests.benchmarks.bench_cgroup DIRECTORY [--shapes deep tied] [--budgets auto min 192MiB] [--limit 768MiB]

Each run lives, or is refused before its first step; one that the kernel ends is ``"killed"``. Anonymous memory is
RssAnon + RssShmem, above what the process had after a tiny run of everything. Needs root, or a group of one's own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from lightning_ssd.sizes import parse_nbytes
from tests.benchmarks.support import ROOT, emit, facts, say
from tests.helpers.control_group import control_group
from tests.memory_bounds.shapes import SHAPES


def main() -> None:
    """Run, and end with an error if a run was neither alive nor refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--budgets", nargs="+", default=["auto", "min", "192MiB"])
    parser.add_argument("--limit", default="768MiB")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", help="append the lines to this file")
    args = parser.parse_args()
    common = {"benchmark": "cgroup", **facts(args.directory), "limit_nbytes": parse_nbytes(args.limit)}
    bad = 0
    for name in args.shapes:
        for budget in args.budgets:
            line = run(name, budget, args.directory, parse_nbytes(args.limit), args.steps)
            say(f"{name}, {budget}: {line['outcome']}")
            bad += line["outcome"] not in ("lives", "refused")
            emit(common | line, args.out)
    raise SystemExit(f"{bad} runs neither lived nor were refused" if bad else 0)


def run(name: str, budget: str, directory: Path, limit_nbytes: int, steps: int) -> dict[str, Any]:
    """One run in a group of its own."""
    program = [sys.executable, "-m", "tests.memory_bounds.shape", name, budget, str(directory), str(steps)]
    with control_group(limit_nbytes) as group:
        done = group.run(program, {**os.environ, "PYTHONPATH": str(ROOT)})
        line = {"peak_of_group_nbytes": group.peak_nbytes, "shape": name, "host_memory": budget}
        if group.num_killed:
            return line | {"outcome": "killed"}
    found = [text for text in done.stdout.splitlines() if text.startswith("{")]
    if done.returncode != 0 or not found:
        return line | {"outcome": "fails", "error": done.stderr[-2000:]}
    return line | json.loads(found[-1])


if __name__ == "__main__":
    main()
