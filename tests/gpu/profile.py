"""One profiled step: what the device did in it, from torch's profiler, or from the simulated device's own account."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.device import IS_SIMULATED

import torch  # isort: skip

KINDS = ("kernel", "to_device", "to_host")
HOST_WAITS = ("Synchronize", "cudaMemcpy", "cudaMalloc", "cudaFree", "cudaHostRegister")  # in names of CUDA functions


@dataclass(frozen=True)
class Work:
    """What the device did.

    Attributes:
        kind: One of `KINDS`.
        begin_s: When it began.
        end_s: When it ended.
        nbytes: Bytes, of a copy.
        is_pinned: Whether the host's side of a copy is pinned.
    """

    kind: str
    begin_s: float
    end_s: float
    nbytes: int = 0
    is_pinned: bool = True


def figures(work: list[Work], wall_s: float) -> dict[str, Any]:
    """Shares of a step of ``wall_s`` seconds, bytes, and GB/s of copies while one was under way."""
    times = {kind: merged((w.begin_s, w.end_s) for w in work if w.kind == kind) for kind in KINDS}
    copies = merged(times["to_device"] + times["to_host"])
    copies_s = length(copies)
    found: dict[str, Any] = {
        "wall_s": wall_s,
        "busy_share": length(times["kernel"]) / wall_s,
        "num_kernels": sum(w.kind == "kernel" for w in work),
        "copies_under_kernels": length(common(copies, times["kernel"])) / copies_s if copies_s else None,
    }
    for kind in KINDS[1:]:
        nbytes, busy_s = sum(w.nbytes for w in work if w.kind == kind), length(times[kind])
        found[f"{kind}_nbytes"] = nbytes
        found[f"{kind}_gbps"] = nbytes / busy_s / 1e9 if busy_s else None
        found[f"{kind}_pageable_nbytes"] = sum(w.nbytes for w in work if w.kind == kind and not w.is_pinned)
    return found


def merged(times: Any) -> list[tuple[float, float]]:
    """The union of pairs of begin and end, in order."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(times):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def common(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """What two unions have in common."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            found.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(times: list[tuple[float, float]]) -> float:
    """Seconds in a union."""
    return sum(end - begin for begin, end in times)


class Profile:
    """Begin it a step ahead of the one that counts: the profiler needs some time to start."""

    def __init__(self) -> None:
        self._begin_s = 0.0
        if not IS_SIMULATED:
            schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
            self._profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA], schedule=schedule, on_trace_ready=self._read
            )
            self._profiler.start()
        self._found: dict[str, Any] = {}

    def begin(self) -> None:
        """The step begins."""
        self._begin_s = time.perf_counter()
        if IS_SIMULATED:
            from tests.simulated_cuda.device import core

            core.take_spans()
            self._waits = Counter(core.counts())
        else:
            self._profiler.step()

    def end(self) -> dict[str, Any]:
        """It has ended, and the device with it."""
        wall_s = time.perf_counter() - self._begin_s
        if IS_SIMULATED:
            return figures(simulated_work(), wall_s) | {"host_waits": self._simulated_waits()}
        self._profiler.step()  # calls `_read`
        self._profiler.stop()
        return figures(self._found["work"], wall_s) | {"host_waits": self._found["host_waits"]}

    def _read(self, profiler: Any) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "profile.json"
            profiler.export_chrome_trace(str(path))
            self._found = read_chrome(json.loads(path.read_text())["traceEvents"])

    def _simulated_waits(self) -> dict[str, dict[str, float]]:
        from tests.simulated_cuda.device import core

        found = Counter(core.counts()) - self._waits
        return {name[len("wait: ") :]: {"num": n} for name, n in found.items() if name.startswith("wait: ")}


def simulated_work() -> list[Work]:
    """Since the last call, of the simulated device."""
    from tests.simulated_cuda.device import core

    return [Work(KINDS[span.engine], span.begin, span.end, span.nbytes) for span in core.take_spans()]


def read_chrome(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Work of the device, and calls for which the host waited, by name: how many, and seconds."""
    work: list[Work] = []
    waits: dict[str, dict[str, float]] = {}
    for event in events:
        kind = event.get("cat", "")
        if event.get("ph") != "X":
            continue
        begin_s, took_s, name = event["ts"] / 1e6, event["dur"] / 1e6, event["name"]
        if kind in ("kernel", "gpu_memset"):
            work.append(Work("kernel", begin_s, begin_s + took_s))
        elif kind == "gpu_memcpy":
            kind = "to_device" if "HtoD" in name else "to_host" if "DtoH" in name else "kernel"
            nbytes = int(event.get("args", {}).get("bytes", 0))
            work.append(Work(kind, begin_s, begin_s + took_s, nbytes, "Pageable" not in name))
        elif kind in ("cuda_runtime", "cuda_driver") and any(part in name for part in HOST_WAITS) and took_s > 2e-5:
            entry = waits.setdefault(name, {"num": 0, "s": 0.0})
            entry["num"] += 1
            entry["s"] += took_s
    return {"work": work, "host_waits": waits}
