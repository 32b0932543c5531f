"""Nanoseconds per parameter of the kernels beside torch's and DeepSpeed's, as one JSON line on standard output.

    python -m tests.benchmarks.bench_kernels [--numel 50000000] [--rounds 31] [--deepspeed-python DS/bin/python]

One round runs every contestant once, in an order drawn anew; a figure is the median over rounds, a ratio the median of
the ratios within a round. The tensors lie one after the other in one pool, in huge pages, as a run's do.

``floor_*`` is a loop in C over the same bytes, in place, that computes next to nothing (``same_bytes.c``; needs a C
compiler), with ordinary loads and stores: what memory allows these. Our kernels write the bf16 that they emit past the
caches, so it is not read before it is overwritten as it is in the floor (2 of the floor's 32 bytes per parameter, of 30
with bf16 gradients): above 1.0 is possible. DeepSpeed's Adam runs in a process of its Python that waits for its turn,
in huge pages too.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ssd.kernels import api as kernels
from lightning_ssd.kernels.options import AdamOptions
from lightning_ssd.memory.pool import Pool, pool_nbytes
from tests.benchmarks.support import emit, end, facts, in_own_session, launch, median, say

HERE = Path(__file__).resolve().parent
OURS = "adamw_emit_bf16"
RATIOS = {  # name: numerator, denominator
    "floor / adamw": ("floor_fp32", "adamw"),
    "floor / adamw+bf16": ("floor_fp32_emit_bf16", OURS),
    "floor / adamw+bf16, bf16 gradient": ("floor_bf16_emit_bf16", "adamw_bf16_grad_emit_bf16"),
    "adamw / torch fused": ("adamw", "torch_fused"),
    "adamw+bf16 / torch fused, then copy": (OURS, "torch_fused_then_bf16"),
    "adamw+bf16 / DeepSpeedCPUAdam, then copy": (OURS, "deepspeed_then_bf16"),
    "norm and finite check / adamw+bf16": ("sum_of_squares_fp32", OURS),
    "norm and finite check / adamw+bf16, bf16 gradient": ("sum_of_squares_bf16", "adamw_bf16_grad_emit_bf16"),
}
REST_S = 0.02  # between contestants: OpenMP's threads spin for a while after their work
Case = Callable[[], float | None]  # runs once; seconds, or None to be timed from outside


def main() -> None:
    """Run and write the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--deepspeed-python", default=os.environ.get("DEEPSPEED_PYTHON"))
    parser.add_argument("--out", help="append the line to this file")
    args = parser.parse_args()
    in_own_session()
    torch.manual_seed(0)
    line: dict[str, Any] = {
        "benchmark": "kernels",
        **facts(),
        "is_bit_equal_to_torch": kernels.is_bit_equal_to_torch(),
        "numel": args.numel,
        "rounds": args.rounds,
    }
    tensors = Tensors(args.numel)
    for num_threads in args.threads:
        say(f"kernels: {num_threads} threads")
        if kernels.is_native():
            kernels._native.set_num_kernel_threads(num_threads)
        torch.set_num_threads(num_threads)
        with ExitStack() as stack:
            cases = contestants(tensors) | stack.enter_context(floors(tensors, num_threads))
            if args.deepspeed_python:
                cases |= stack.enter_context(deepspeed(args.deepspeed_python, args.numel, num_threads))
            seconds = run_rounds(cases, args.rounds)
        line[f"threads_{num_threads}"] = {"kernels": kernels.describe(), **summary(seconds, args.numel)}
    emit(line, args.out)


class Tensors:
    """What all contestants work on: 1D, ``numel`` long."""

    def __init__(self, numel: int) -> None:
        full, half = pool_nbytes(4 * numel), pool_nbytes(2 * numel)
        pool = Pool(4 * full + 2 * half, "benchmark")

        def lent(nbytes: int, dtype: torch.dtype) -> Tensor:
            return pool.lend(nbytes, "benchmark").tensor(0, dtype, (numel,))

        self.param, self.grad, self.exp_avg, self.exp_avg_sq = (lent(full, torch.float32).uniform_() for _ in range(4))
        self.low, self.low_grad = (lent(half, torch.bfloat16) for _ in range(2))
        self.low.zero_()
        self.low_grad.copy_(self.grad)
        self.step = torch.tensor(10.0)


def contestants(t: Tensors) -> dict[str, Case]:
    """What runs in this process, by name."""
    moments: dict[str, Any] = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01}
    adamw = AdamOptions(step=10, betas=(0.9, 0.999), decoupled=True, **moments)
    fused: dict[str, Any] = {**moments, "beta1": 0.9, "beta2": 0.999, "amsgrad": False, "maximize": False}
    states = ([t.param], [t.grad], [t.exp_avg], [t.exp_avg_sq], [], [t.step])

    def ours(grad: Tensor, out: Tensor | None) -> None:
        kernels.adam_(t.param, grad, t.exp_avg, t.exp_avg_sq, adamw, out=out)

    def torch_fused() -> None:
        torch._fused_adamw_(*states, **fused)

    def torch_fused_then_bf16() -> None:
        torch_fused()
        t.low.copy_(t.param)

    cases: dict[str, Callable[[], object]] = {
        "adamw": lambda: ours(t.grad, None),
        OURS: lambda: ours(t.grad, t.low),
        "adamw_bf16_grad_emit_bf16": lambda: ours(t.low_grad, t.low),
        "torch_fused": torch_fused,
        "torch_fused_then_bf16": torch_fused_then_bf16,
        "sum_of_squares_fp32": lambda: kernels.sum_of_squares(t.grad),
        "sum_of_squares_bf16": lambda: kernels.sum_of_squares(t.low_grad),
        "torch_norm_fp32": t.grad.norm,
        "convert_fp32_bf16": lambda: kernels.convert_(t.low, t.param),
        "torch_copy_fp32_bf16": lambda: t.low.copy_(t.param),
        "crc32c_4_bytes": lambda: kernels.crc32c(t.grad.data_ptr(), 4 * t.grad.numel()),
    }
    return {name: _untimed(case) for name, case in cases.items()}


@contextmanager
def floors(t: Tensors, num_threads: int) -> Iterator[dict[str, Case]]:
    """The loops of ``same_bytes.c``, over as many threads as the kernels use; none without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        say("kernels: no C compiler, so no floor")
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(num_threads) as pool:
        built = f"{folder}/same_bytes.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-o", built, str(HERE / "same_bytes.c")], check=True)
        library = ctypes.CDLL(built)  # its calls release the interpreter lock
        numel = t.param.numel()
        cuts = [ctypes.c_size_t(numel * i // num_threads) for i in range(num_threads + 1)]

        def case(name: str, grad: Tensor) -> Case:
            tensors = [t.param, grad, t.exp_avg, t.exp_avg_sq, t.low]
            pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
            function = getattr(library, name)
            return _untimed(
                lambda: list(pool.map(lambda i: function(*pointers, cuts[i], cuts[i + 1]), range(num_threads)))
            )

        grads = {"fp32": t.grad, "fp32_emit_bf16": t.grad, "bf16_emit_bf16": t.low_grad}
        yield {f"floor_{name}": case(name, grad) for name, grad in grads.items()}


@contextmanager
def deepspeed(python: str, numel: int, num_threads: int) -> Iterator[dict[str, Case]]:
    """DeepSpeed's Adam in its own process, which does a step when it is told to."""
    env = {"OMP_NUM_THREADS": str(num_threads), "DS_ACCELERATOR": "cpu"}
    env["THP_MEM_ALLOC_ENABLE"] = "1"  # torch's own memory in huge pages
    env["PATH"] = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed looks for ninja
    command = [python, str(HERE / "peers" / "deepspeed_adam.py"), str(numel)]
    process = launch(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None

    def answer() -> str:
        for line in process.stdout or ():
            if line.startswith(b"@ "):
                return line[2:].decode().strip()
        raise SystemExit(f"{' '.join(command)} ended: see above")

    def step() -> float:
        assert process.stdin is not None
        process.stdin.write(b"step\n")
        process.stdin.flush()
        return float(answer())

    try:
        answer()
        yield {"deepspeed_then_bf16": step}
        process.stdin.close()
        process.wait()
    finally:
        end(process)


def run_rounds(cases: dict[str, Case], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order = random.Random(0)
    for i in range(num_rounds + 1):
        for name in order.sample(list(cases), len(cases)):
            time.sleep(REST_S)
            begin = time.perf_counter()
            own_s = cases[name]()
            if i > 0:  # the first touches pages and starts threads
                seconds[name].append(time.perf_counter() - begin if own_s is None else own_s)
    return seconds


def summary(seconds: dict[str, list[float]], numel: int) -> dict[str, float]:
    """Nanoseconds per parameter, and the ratios of which both sides ran."""
    found = {f"{name}_ns": median(values) / numel * 1e9 for name, values in seconds.items()}
    for name, (above, below) in RATIOS.items():
        if above in seconds and below in seconds:
            found[name] = median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
    return found


def _untimed(case: Callable[[], object]) -> Case:
    def run() -> None:
        case()

    return run


if __name__ == "__main__":
    main()
