"""A control group with a memory limit, in which a program is run."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Version:
    root: str
    limit: str
    peak: str
    events: str


_V1 = _Version("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
_V2 = _Version("/sys/fs/cgroup", "memory.max", "memory.peak", "memory.events")


class ControlGroup:
    """One group."""

    def __init__(self, folder: Path, version: _Version) -> None:
        self._folder = folder
        self._version = version

    def run(self, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a program inside."""
        enter = 'echo $$ > "$0" && exec "$@"'
        command = ["/bin/sh", "-c", enter, str(self._folder / "cgroup.procs"), *argv]
        return subprocess.run(command, env=dict(env), capture_output=True, text=True, check=False)

    @property
    def peak_nbytes(self) -> int:
        """Largest use so far, page cache included; 0 where the kernel does not tell."""
        peak = self._folder / self._version.peak
        return int(peak.read_text()) if peak.exists() else 0

    @property
    def num_killed(self) -> int:
        """Processes that the kernel ended for want of memory."""
        lines = (self._folder / self._version.events).read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


@contextmanager
def control_group(limit_nbytes: int) -> Iterator[ControlGroup]:
    """A group inside our own that may take so much memory.

    Raises:
        OSError: This user, or this machine, cannot make one.
    """
    version, parent = _own_group()
    folder = Path(tempfile.mkdtemp(prefix="lightning-ssd-", dir=parent))
    try:
        (folder / version.limit).write_text(str(limit_nbytes))
        yield ControlGroup(folder, version)
    finally:
        folder.rmdir()


def can_make_one() -> bool:
    """Whether `control_group` works here."""
    try:
        with control_group(1 << 30) as group:
            return os.access(group._folder / "cgroup.procs", os.W_OK)
    except OSError:
        return False


def _own_group() -> tuple[_Version, Path]:
    paths = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update({name: path for name in controllers.split(",")})
    version = _V1 if "memory" in paths else _V2
    return version, Path(version.root + paths["memory" if "memory" in paths else ""])
