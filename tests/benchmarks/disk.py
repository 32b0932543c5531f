"""Speed of the disk under a benchmark: one scratch file, moved by our engine or by fio in the same pattern.

Rates are GB/s, 10^9 bytes per second. Three jobs: "read" and "write" go through the file once; "mixed" alternates
reads of its first half with writes to its second, as many bytes in all.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning_ssd.io.engine import Engine, IOOptions, Transfer
from lightning_ssd.io.file import File
from lightning_ssd.io.select import make_engine
from lightning_ssd.memory.pool import map_anonymous
from lightning_ssd.memory.views import address_of
from lightning_ssd.sizes import MiB, parse_nbytes

TRANSFER_NBYTES = 32 * MiB  # what the store asks for at once
NUM_BUFFERS = 4
DEFAULTS = IOOptions()
JOBS = ("read", "write", "mixed")


@dataclass(frozen=True)
class Cell:
    """One job, once.

    Attributes:
        gbps: Bytes per second, reads and writes added.
        cpu_s_per_gb: User and system time of this process and its threads, the kernel's on its behalf included.
    """

    gbps: float
    cpu_s_per_gb: float


class Scratch:
    """A file with its blocks written, and memory to move it through.

    Attributes:
        file: The file.
        nbytes: Its length, a multiple of two transfers.
    """

    def __init__(self, folder: str, nbytes: int) -> None:
        self.nbytes = max(nbytes // (2 * TRANSFER_NBYTES), 1) * 2 * TRANSFER_NBYTES
        self._folder = folder
        self._memory = map_anonymous(NUM_BUFFERS * TRANSFER_NBYTES)  # as a run's arena
        self._memory[:] = os.urandom(len(self._memory))  # storage that folds equal blocks finds none
        self._address = address_of(self._memory)
        self.file = File.create(os.path.join(folder, "scratch"), self.nbytes, direct=True)
        self.own("write")  # the first write to new space is slower, and is not what is measured

    def own(self, job: str, options: IOOptions = DEFAULTS, *, registered: bool = True) -> Cell:
        """Run ``job`` by our engine.

        Raises:
            ConfigurationError: The engine does not work here.
        """
        engine = make_engine(options)
        try:
            if registered:
                engine.register_memory(self._address, NUM_BUFFERS * TRANSFER_NBYTES)
            cpu_s, start_s = _used_cpu_s(), time.monotonic()
            self._run(engine, self._transfers(job))
            taken_s = time.monotonic() - start_s
            return Cell(self.nbytes / taken_s / 1e9, (_used_cpu_s() - cpu_s) / self.nbytes * 1e9)
        finally:
            engine.close()

    def exchange(self, engine: Engine, read_nbytes: float, written_nbytes: float) -> None:
        """Read and write so many bytes by ``engine``, evenly mixed, in whole transfers."""
        num_reads, num_writes = (round(n / TRANSFER_NBYTES) for n in (read_nbytes, written_nbytes))
        total, count = num_reads + num_writes, self.nbytes // TRANSFER_NBYTES
        writes = ((i + 1) * num_writes // total - i * num_writes // total for i in range(total))
        self._run(engine, ((bool(is_write), i % count * TRANSFER_NBYTES) for i, is_write in enumerate(writes)))

    def huge_nbytes(self) -> int:
        """How much of the memory is in huge pages: in scattered small ones a transfer takes many more requests."""
        return huge_nbytes(self._address)

    def fio(self, job: str, engine: str, options: IOOptions = DEFAULTS, *, huge: bool = True) -> Cell:
        """Run ``job`` by fio's ``engine`` with our block size and depth, on the same offsets in the same order.

        With ``huge``, fio's memory is in huge pages where the system grants them.
        """
        block = parse_nbytes(options.block_nbytes)
        command = ["fio", "--name=probe", "--thread", f"--ioengine={engine}", "--direct=1", "--output-format=json"]
        command += [f"--bs={block}", f"--iodepth={options.depth}", f"--filename={self.file.path}", "--fallocate=none"]
        if job == "mixed":
            log = Path(self._folder) / f"pattern-{block}"
            if not log.exists():
                log.write_text(self._pattern(block))
            command += [f"--read_iolog={log}"]
        else:
            command += [f"--rw={job}", f"--size={self.nbytes}"]
        env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if huge else None
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
        result = json.loads(output[output.index("{") :])["jobs"][0]
        sides = [result["read"], result["write"]]
        nbytes, taken_s = sum(s["io_bytes"] for s in sides), max(s["runtime"] for s in sides) / 1e3
        # Of a replayed pattern fio counts neither the bytes nor the time of what is in flight when the pattern ends.
        uncounted = options.depth * block if job == "mixed" else 0
        if not self.nbytes - uncounted <= nbytes <= self.nbytes:
            raise SystemExit(f"fio moved {nbytes} bytes instead of {self.nbytes}: {' '.join(command)}")
        cpu_s = (result["usr_cpu"] + result["sys_cpu"]) / 100 * result["job_runtime"] / 1e3
        return Cell(nbytes / taken_s / 1e9, cpu_s / nbytes * 1e9)

    def rates(self, tool: str = "own") -> dict[str, float]:
        """Rate of each job now, by our engine ("own") or by fio's io_uring ("fio")."""
        return {job: (self.own(job) if tool == "own" else self.fio(job, "io_uring")).gbps for job in JOBS}

    def _run(self, engine: Engine, transfers: Iterable[tuple[bool, int]]) -> None:
        in_flight: deque[Transfer] = deque()
        for i, (is_write, offset) in enumerate(transfers):
            if len(in_flight) == NUM_BUFFERS:
                in_flight.popleft().wait()
            start = engine.write if is_write else engine.read
            address = self._address + i % NUM_BUFFERS * TRANSFER_NBYTES
            in_flight.append(start(self.file, offset, address, TRANSFER_NBYTES))
        while in_flight:
            in_flight.popleft().wait()

    def _transfers(self, job: str) -> Iterator[tuple[bool, int]]:
        """Whether it is a write, and where, for each transfer of ``job`` in order."""
        count = self.nbytes // TRANSFER_NBYTES
        for i in range(count):
            if job == "mixed":
                yield i % 2 == 1, (i // 2 + i % 2 * (count // 2)) * TRANSFER_NBYTES
            else:
                yield job == "write", i * TRANSFER_NBYTES

    def _pattern(self, block: int) -> str:
        """The mixed job as a log that fio replays as fast as it can."""
        path = self.file.path
        lines = ["fio version 2 iolog", f"{path} add", f"{path} open"]
        for is_write, begin in self._transfers("mixed"):
            word = "write" if is_write else "read"
            lines += [f"{path} {word} {begin + at} {block}" for at in range(0, TRANSFER_NBYTES, block)]
        return "\n".join([*lines, f"{path} close", ""])


@contextmanager
def scratch(directory: str | os.PathLike[str], nbytes: int) -> Iterator[Scratch]:
    """A `Scratch` in a new folder under ``directory``, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="bench-disk-", dir=directory) as folder:
        made = Scratch(folder, nbytes)
        try:
            yield made
        finally:
            made.file.close()


def huge_nbytes(address: int) -> int:
    """Bytes in huge pages of the mapping of this process that ``address`` lies in."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(text, 16) for text in words[0].split("-"))
            is_inside = begin <= address < end
        elif is_inside and words[0] == "AnonHugePages:":
            return int(words[1]) * 1024
    return 0


def has_fio() -> bool:
    """Whether fio is installed."""
    return shutil.which("fio") is not None


def _used_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
