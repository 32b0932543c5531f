"""What a second run costs in Python: noting what a block's objects hold, and putting it back. A JSON line a block.

    python -m tests.benchmarks.bench_python_state [--out docs/results/python_state.jsonl]

CPU time of the calling thread for one block and step: median and fifth percentile of many, so that others on the
machine matter little.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from lightning_ssd.step.python_state import PythonState
from lightning_ssd.step.state_holders import surroundings
from tests.benchmarks.support import emit, facts
from tests.helpers.models import GPT


def main() -> None:
    """Measure each block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--out", help="append the lines to this file")
    args = parser.parse_args()
    x = torch.zeros(1, 16, 64)
    layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(16)))
    blocks: dict[str, tuple[nn.Module, object]] = {
        "GPT block of the tests": (GPT(width=64, layers=1).blocks[0], x),
        "nn.TransformerEncoderLayer": (layer, x),
        "16 pairs of Linear and ReLU": (deep, x),
        "the same, given a cache of 64 tensors": (deep, {i: [torch.zeros(8), torch.zeros(8)] for i in range(32)}),
    }
    for name, (block, given) in blocks.items():
        times = {key: sorted(found) for key, found in measure(block, given, args.repeats).items()}
        middle = {f"{key}_median_ms": found[len(found) // 2] * 1e3 for key, found in times.items()}
        least = {f"{key}_p5_ms": found[len(found) // 20] * 1e3 for key, found in times.items()}
        line = {"benchmark": "python_state", **facts(), "block": name, "num_modules": len(list(block.modules()))}
        emit(line | {"repeats": args.repeats, "threads": torch.get_num_threads()} | middle | least, args.out)


def measure(block: nn.Module, given: object, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition: noting before the first run, putting back around the second."""
    around = surroundings(block)  # once a run
    times: dict[str, list[float]] = {"note": [], "restored": []}
    for _ in range(repeats):
        begin = time.thread_time()
        arguments, own = PythonState((given,)), PythonState((block,), around)
        noted = time.thread_time()
        with own.restored(), arguments.restored(_same):
            pass
        times["note"].append(noted - begin)
        times["restored"].append(time.thread_time() - noted)
    return times


def _same(value: object) -> object:
    return value.view_as(value) if isinstance(value, Tensor) else value


if __name__ == "__main__":
    main()
