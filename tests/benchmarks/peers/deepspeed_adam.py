"""DeepSpeedCPUAdam, then its copy to bf16, run by DeepSpeed's Python for `bench_kernels`: one step for each line on
standard input, whose seconds it prints after an ``@``; ``@ ready`` comes first.

    OMP_NUM_THREADS=2 python tests/benchmarks/peers/deepspeed_adam.py NUMEL
"""

from __future__ import annotations

import os
import sys
import time

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch


def main() -> None:
    """Serve until standard input ends."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # The op's own OpenMP takes OMP_NUM_THREADS, torch's copy of OpenMP does not hear of it.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    param = torch.nn.Parameter(torch.rand(int(sys.argv[1])))
    param.grad = torch.rand_like(param)
    low = torch.zeros(param.numel(), dtype=torch.bfloat16)
    optimizer = DeepSpeedCPUAdam([param], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, adamw_mode=True)
    say("ready")
    for _ in sys.stdin:
        begin = time.perf_counter()
        optimizer.step()
        with torch.no_grad():
            low.copy_(param)
        say(time.perf_counter() - begin)


def say(what: object) -> None:
    """One answer."""
    sys.stdout.write(f"@ {what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
