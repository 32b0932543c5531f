"""How much host memory this process may still take: the machine's, or its control group's if that is less. Bytes."""

from __future__ import annotations

import os

AUTO_SHARE = 0.5
"""Share of the available memory that ``host_memory="auto"`` takes."""


def available_nbytes() -> int:
    """Memory that can be taken now without swapping, within the limit of every enclosing control group."""
    return min([_meminfo("MemAvailable"), *_cgroup_rooms()])


def _meminfo(key: str) -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {key}")


def _cgroup_rooms() -> list[int]:
    """Limit minus use of each enclosing group that has a limit (version 2, else version 1)."""
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
                rooms.append(max(0, int(limits[0]) - int(useds[0])))
    return rooms


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []
