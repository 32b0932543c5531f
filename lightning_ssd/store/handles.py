"""Counts the open files and mappings that a run needs, and compares them with the limits before the first step.

A generation is an open file: one descriptor, or two with O_DIRECT. While a checkpoint is saved and when the run ends it
is also mapped: one mapping, and the descriptor that Python holds for it. Gradients on disk are mapped too.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

from lightning_ssd.errors import StoreError

_SPARE = 128
"""For what else the process opens meanwhile: data loaders, loggers, checkpoints that are read."""

_WAY_OUT = "or cut fewer, larger units with units=... or min_unit_numel=..."


@dataclass(frozen=True)
class Handles:
    """What a run needs, beside what is open already.

    Attributes:
        num_files: Descriptors.
        num_maps: Mappings.
    """

    num_files: int
    num_maps: int


def handles(num_generations: int, num_spills: int, num_spare: int, *, direct: bool) -> Handles:
    """Count them.

    Args:
        num_generations: Units times kinds.
        num_spills: Units whose gradients are on disk.
        num_spare: Files that are being written or wait to be recycled, at most.
        direct: O_DIRECT is used.
    """
    each = 2 if direct else 1
    return Handles(
        num_files=(num_generations + num_spare) * each + num_generations + 2 * num_spills + _SPARE,
        num_maps=num_generations + num_spills + _SPARE,
    )


def require_handles(needed: Handles, what: str) -> None:
    """Refuse a run that would exceed a limit later.

    Raises:
        StoreError: Names what is needed, the limit, and how it is raised.
    """
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = needed.num_files + len(os.listdir("/proc/self/fd"))
    if limit != resource.RLIM_INFINITY and files > limit:
        raise StoreError(
            f"{what} needs {files} open files, the limit of this process is {limit}; raise the hard limit (ulimit -Hn "
            f"{files}, LimitNOFILE= of a systemd service, --ulimit nofile={files} of a container) {_WAY_OUT}"
        )
    with open("/proc/self/maps", "rb") as lines:
        maps = needed.num_maps + sum(1 for _ in lines)
    most = _max_map_count()
    if maps > most:
        raise StoreError(
            f"{what} needs {maps} mappings, the system allows a process {most}; raise it (sysctl "
            f"vm.max_map_count={maps}) {_WAY_OUT}"
        )


def _max_map_count() -> int:
    with open("/proc/sys/vm/max_map_count") as file:
        return int(file.read())
