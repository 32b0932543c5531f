"""The results as a table of Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Line = dict[str, Any]
SHOWN = (
    "left_out",
    "error",
    "device",
    "matmul_tflops",
    "copies_gbps",
    "disk_gbps",
    "num_usable_cpus",
    "has_native",
    "took_s",
    "num_passed",
    "failed",
    "skipped",
    "is_complete",
    "errors",
)


def _path(*keys: str, scale: float = 1, digits: int = 1) -> Callable[[Line], str]:
    def read(line: Line) -> str:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return "" if value is None else f"{value * scale:.{digits}f}"

    return read


COLUMNS: dict[str, Callable[[Line], str]] = {
    "size": lambda line: str(line["size"]),
    "system": lambda line: str(line["system"]),
    "batch": lambda line: str(line["batch"]),
    "step s": _path("step_s", digits=3),
    "tokens/s": _path("tokens_per_s", digits=0),
    "TFLOPS 6P": _path("tflops_6p"),
    "8P": _path("tflops_8p"),
    "% of peak 6P": _path("share_of_peak_6p", scale=100),
    "floor/step": _path("overlap", digits=2),
    "device GB": _path("peak_device_nbytes", scale=1e-9),
    "reserved": _path("peak_device_reserved_nbytes", scale=1e-9),
    "host GB": _path("peak_host_nbytes", scale=1e-9),
    "GPU busy %": _path("profile", "busy_share", scale=100),
    "H2D GB": _path("profile", "to_device_nbytes", scale=1e-9, digits=2),
    "GB/s": _path("profile", "to_device_gbps"),
    "D2H GB": _path("profile", "to_host_nbytes", scale=1e-9, digits=2),
    "GB/s ": _path("profile", "to_host_gbps"),
    "under kernels %": _path("profile", "copies_under_kernels", scale=100),
    "disk read GB/s": _path("read_gbps"),
    "written GB/s": _path("written_gbps"),
    "ours/this": _path("ours_to_this", digits=2),
}


def table(lines: list[Line]) -> str:
    """All lines that ran, and why the others did not."""
    found = [_about(line) for line in lines if line["part"] != "sizes"]
    jobs = [line for line in lines if line["part"] == "sizes"]
    ran = [line for line in jobs if "step_s" in line]
    if ran:
        found += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        found += ["| " + " | ".join(read(line) for read in COLUMNS.values()) + " |" for line in ran]
        found += ["", *filter(None, map(_waits, ran))]
    for line in jobs:
        why = line.get("left_out") or line.get("error")
        if why:
            found.append(f"{line['size']} {line['system']} x {line['batch']}: {why.splitlines()[-1]}")
    return "\n".join(found) + "\n"


def _about(line: Line) -> str:
    shown = {key: value for key, value in line.items() if key in SHOWN}
    if isinstance(shown.get("failed"), dict):
        shown["failed"] = list(shown["failed"])
    return f"{line['part']}: {shown}"


def _waits(line: Line) -> str:
    waits = line.get("profile", {}).get("host_waits", {})
    ours = line.get("trace", {}).get("waits_s", {})
    told = [
        f"{name} x {wait['num']}" + (f" ({wait['s']:.3f} s)" if "s" in wait else "") for name, wait in waits.items()
    ]
    told += [f"{name} {seconds:.3f} s" for name, seconds in ours.items()]
    return f"{line['size']} {line['system']} x {line['batch']}, the host waited: {', '.join(told)}" if told else ""
