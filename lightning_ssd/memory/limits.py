"""How much host memory this process can still take, by the machine and by its control groups. Bytes."""

from __future__ import annotations

import os

AUTO_SHARE = 0.5
"""Share of the available memory that ``host_memory="auto"`` takes."""


def available_nbytes() -> int:
    """Memory that this process can take now without swapping and within the limits of its control groups."""
    return min([_meminfo("MemAvailable"), *_cgroup_rooms()])


def _meminfo(key: str) -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {key}")


def _cgroup_rooms() -> list[int]:
    """Limit minus use of each control group around this process that has a limit (version 2, else version 1)."""
    rooms = []
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            folder = os.path.join(root, *parts[:depth])
            limits, useds = _lines(os.path.join(folder, limit)), _lines(os.path.join(folder, used))
            if limits and useds and limits[0].isdigit():
                taken = max(0, int(useds[0]) - _reclaimable(os.path.join(folder, "memory.stat")))
                rooms.append(max(0, int(limits[0]) - taken))
    return rooms


def _reclaimable(path: str) -> int:
    """Page cache of a control group: it counts as used, but the kernel frees it when memory is needed.

    If it counted here, a group that has just written a checkpoint or read a data set would look full.
    """
    found = dict(line.split(maxsplit=1) for line in _lines(path))
    # In version 1 the sums over a group and the groups inside it have names of their own; version 2 has only sums.
    return sum(int(found.get(f"total_{key}", found.get(key, 0))) for key in ("active_file", "inactive_file"))


def _lines(path: str) -> list[str]:
    try:
        with open(path, errors="surrogateescape") as file:  # a group's name may have any bytes
            return [line for line in file.read().split("\n") if line]
    except OSError:
        return []
