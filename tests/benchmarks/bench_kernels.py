"""Nanoseconds per parameter of the kernels beside torch's, as one JSON line on standard output.

    python tests/benchmarks/bench_kernels.py [--numel 50000000] [--rounds 7]

One round runs every contestant once, so that a busy neighbour hits all; a figure is the median over rounds, a ratio
the median of the ratios within a round. ``floor`` is what memory allows AdamW: SGD with momentum, which moves 20 bytes
per parameter and computes next to nothing, times 28/20 (30/20 with a bf16 copy).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lightning_ssd.kernels import api as kernels

RATIOS = {  # name: numerator, denominator, factor on the denominator
    "adamw / floor": ("adamw", "sgd_momentum", 28 / 20),
    "adamw+bf16 / floor": ("adamw_emit_bf16", "sgd_momentum", 30 / 20),
    "adamw / torch fused": ("adamw", "torch_fused", 1.0),
    "adamw+bf16 / torch fused, then copy": ("adamw_emit_bf16", "torch_fused_then_bf16", 1.0),
    "norm and finite check / adamw": ("sum_of_squares_fp32", "adamw", 1.0),
}


def main() -> None:
    """Run and write the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = contestants(arguments.numel)
    record: dict[str, Any] = {
        "benchmark": "kernels",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": next(line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        "num_cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": kernels.describe(),
        "is_bit_equal_to_torch": kernels.is_bit_equal_to_torch(),
        "numel": arguments.numel,
        "rounds": arguments.rounds,
    }
    for num_threads in (1, 2):
        kernels.set_num_threads(num_threads)
        torch.set_num_threads(num_threads)
        record[f"threads_{num_threads}"] = _summary(_rounds(cases, arguments.rounds), arguments.numel)
    sys.stdout.write(json.dumps(record) + "\n")


def contestants(numel: int) -> dict[str, Callable[[], object]]:
    """What to time, by name; all over the same tensors of ``numel`` parameters."""
    param, grad, exp_avg, exp_avg_sq = (torch.rand(numel) for _ in range(4))
    low, low_grad = torch.zeros(numel, dtype=torch.bfloat16), grad.bfloat16()
    moments: dict[str, Any] = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01}
    adamw: dict[str, Any] = {**moments, "betas": (0.9, 0.999), "step": 10, "decoupled": True}
    fused: dict[str, Any] = {**moments, "beta1": 0.9, "beta2": 0.999, "amsgrad": False, "maximize": False}
    sgd: dict[str, Any] = {"lr": 1e-3, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}
    states = ([param], [grad], [exp_avg], [exp_avg_sq], [], [torch.tensor(10.0)])

    def torch_fused() -> None:
        torch._fused_adamw_(*states, **fused)

    def torch_fused_then_bf16() -> None:
        torch_fused()
        low.copy_(param)

    return {
        "sgd_momentum": lambda: kernels.sgd_(param, grad, exp_avg, momentum_factor=0.9, first_step=False, **sgd),
        "adamw": lambda: kernels.adam_(param, grad, exp_avg, exp_avg_sq, **adamw),
        "adamw_emit_bf16": lambda: kernels.adam_(param, grad, exp_avg, exp_avg_sq, out=low, **adamw),
        "adamw_bf16_grad_emit_bf16": lambda: kernels.adam_(param, low_grad, exp_avg, exp_avg_sq, out=low, **adamw),
        "torch_fused": torch_fused,
        "torch_fused_then_bf16": torch_fused_then_bf16,
        "sum_of_squares_fp32": lambda: kernels.sum_of_squares(grad),
        "sum_of_squares_bf16": lambda: kernels.sum_of_squares(low_grad),
        "torch_norm_fp32": grad.norm,
        "convert_fp32_bf16": lambda: kernels.convert_(low, param),
        "torch_copy_fp32_bf16": lambda: low.copy_(param),
        "crc32c_4_bytes": lambda: kernels.crc32c(grad.data_ptr(), 4 * numel),
    }


def _rounds(cases: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_index in range(num_rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if round_index > 0:  # the first touches pages and starts threads
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _summary(seconds: dict[str, list[float]], numel: int) -> dict[str, float]:
    summary = {f"{name}_ns": round(statistics.median(values) / numel * 1e9, 3) for name, values in seconds.items()}
    for name, (above, below, factor) in RATIOS.items():
        ratios = [a / (b * factor) for a, b in zip(seconds[above], seconds[below], strict=True)]
        summary[name] = round(statistics.median(ratios), 3)
    return summary


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


if __name__ == "__main__":
    main()
