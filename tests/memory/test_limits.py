"""Memory that may be taken, from faked system files of every layout."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_ssd.memory import limits

KIB = 1024
MIB = 1024 * KIB

USE_BLOCKS = """
import ctypes, json, resource
from lightning_ssd.memory.heap import bound_heap

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def resident_nbytes():
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * resource.getpagesize()

def use(nbytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(nbytes))
    ctypes.memset(block, 1, nbytes)
    libc.free(ctypes.c_void_p(block))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

bound_heap()
small = [use(4 << 20) for _ in range(4)]
before = resident_nbytes()
for _ in range(3):
    use(24 << 20)
print(json.dumps({"small_faults": small, "left_nbytes": resident_nbytes() - before}))
"""


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a faked system with 800 KiB available and no control groups."""
    real = limits._lines
    monkeypatch.setattr(limits, "_lines", lambda path: real(f"{tmp_path}{path}"))
    monkeypatch.setattr(limits, "_meminfo", lambda key: 800 * KIB)
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_without_groups_it_is_what_the_machine_has(system: Path) -> None:
    assert limits.available_nbytes() == 800 * KIB


def test_version_2_takes_the_tightest_of_all_enclosing_groups(system: Path) -> None:
    write(
        system,
        {
            "proc/self/cgroup": "0::/jobs/mine\n",
            "sys/fs/cgroup/jobs/memory.max": f"{500 * KIB}\n",
            "sys/fs/cgroup/jobs/memory.current": f"{200 * KIB}\n",
            "sys/fs/cgroup/jobs/mine/memory.max": "max\n",
            "sys/fs/cgroup/jobs/mine/memory.current": f"{100 * KIB}\n",
        },
    )
    assert limits.available_nbytes() == 300 * KIB


def test_page_cache_of_a_group_does_not_count_as_used(system: Path) -> None:
    write(
        system,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{500 * KIB}\n",
            "sys/fs/cgroup/memory.current": f"{500 * KIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon {90 * KIB}\nactive_file {150 * KIB}\ninactive_file {250 * KIB}\n",
        },
    )
    assert limits.available_nbytes() == 400 * KIB


def test_version_1_by_its_own_names(system: Path) -> None:
    write(
        system,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{600 * KIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{500 * KIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"active_file 0\ntotal_active_file {50 * KIB}\ntotal_inactive_file 0\n",
        },
    )
    assert limits.available_nbytes() == 150 * KIB


def test_a_group_over_its_limit_leaves_nothing(system: Path) -> None:
    write(
        system,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "5000\n",
        },
    )
    assert limits.available_nbytes() == 0


def test_this_machine_has_some() -> None:
    assert 0 < limits.available_nbytes() < 1 << 50


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_small_blocks_are_reused_and_large_ones_go_back() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, "-c", USE_BLOCKS]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert max(found["small_faults"][1:]) < 100  # 1024 if the pages had gone
    assert found["left_nbytes"] < 8 * MIB
