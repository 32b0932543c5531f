"""What the device and the machine do alone: matrix products, copies, the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.gpu.device import IS_SIMULATED

import torch  # isort: skip

from tests.benchmarks.disk import scratch  # isort: skip
from tests.benchmarks.support import facts, median  # isort: skip

LOW = torch.bfloat16
PROBE_NBYTES = 1 << 20 if IS_SIMULATED else 1 << 28
DISK_NBYTES = 1 << 26 if IS_SIMULATED else 1 << 30
SIDE = 256 if IS_SIMULATED else 8192  # of the matrices
NVIDIA_SMI = (
    "name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current,clocks.sm,clocks.max.sm,power.limit"
)


def machine(directory: Path) -> dict[str, Any]:
    """The machine, its device, and what each does alone; rates in GB/s and TFLOPS."""
    found: dict[str, Any] = {**facts(directory), "device": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}
    found |= {"num_devices": torch.cuda.device_count(), "is_simulated": IS_SIMULATED}
    found["device_total_nbytes"] = torch.cuda.get_device_properties(0).total_memory
    found["num_usable_cpus"] = len(os.sched_getaffinity(0))
    found |= {"nvidia_smi": nvidia_smi(), "matmul_tflops": matmul_tflops(), "copies_gbps": copies_gbps()}
    with scratch(directory, DISK_NBYTES) as file:
        found["disk_gbps"] = file.rates()
    return found


def nvidia_smi() -> str | None:
    """What the tool of that name says of the devices."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()


def matmul_tflops() -> float:
    """Of one large product of random bfloat16 matrices."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda").to(LOW) for _ in range(2))
    return 2 * SIDE**3 / seconds(lambda: a @ b, times=10) / 1e12


def copies_gbps() -> dict[str, float]:
    """Each way, of pinned and of pageable memory."""
    on_device = torch.empty(PROBE_NBYTES, dtype=torch.uint8, device="cuda")
    found = {}
    for kind in ("pinned", "pageable"):
        host = torch.empty(PROBE_NBYTES, dtype=torch.uint8, pin_memory=kind == "pinned")
        host.zero_()
        found[f"to_device_{kind}"] = PROBE_NBYTES / seconds(lambda h=host: on_device.copy_(h, non_blocking=True)) / 1e9
        found[f"to_host_{kind}"] = PROBE_NBYTES / seconds(lambda h=host: h.copy_(on_device, non_blocking=True)) / 1e9
    return found


def seconds(work: Any, times: int = 5) -> float:
    """Of one call, the device being done: the median of ``times`` after two that do not count."""
    took = []
    for _ in range(times + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
        del result
    return median(took[2:])
