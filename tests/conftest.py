"""No test may leave a thread, a file descriptor or a child process behind; plus fixtures used in many folders."""

from __future__ import annotations

import gc
import multiprocessing.resource_tracker as resource_tracker
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.simulated_cuda import requested

REPOSITORY = Path(__file__).resolve().parents[1]
# Before torch is imported, and inherited by every process that a test starts: the models are so small that threads only
# wait for each other, the more so beside a second worker. Sums depend on their number, so it is one for all tests.
os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = ["tests.simulated_cuda.plugin"] if requested() else []

_HAS_NVIDIA = os.path.exists("/dev/nvidiactl")
GRACE_S = 2.0  # a thread that was told to stop, or a child that was killed, may take this long to be gone


# ---------------------------------------------------------------------------------------------------------- leaks


class _Held(NamedTuple):
    threads: dict[int, str]  # kernel thread id: name
    files: dict[int, str]  # descriptor: what it is open on
    children: dict[int, str]  # process id: command line


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> None:
    """Keep what is imported by now out of every collection: a tenth of a second for each, and tests make many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _device_is_open() -> None:
    """What a GPU opens once, it opens before the first test: context, cuBLAS, autograd's thread and its own streams."""
    torch = sys.modules.get("torch")  # a run that does not use it does not wait for its import
    if torch is None or not torch.cuda.is_available():
        return
    x = torch.ones(64, 64, device="cuda", requires_grad=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.empty(1, pin_memory=True).to("cuda", non_blocking=True)
    (x @ x).sum().backward()
    torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(_frozen_imports: None, _device_is_open: None) -> Iterator[None]:
    """Fail a test that leaks a thread, a file descriptor or a child process."""
    before = _held()
    yield
    leaked = _new_since(before)
    deadline = time.monotonic() + GRACE_S
    while leaked and time.monotonic() < deadline:
        # What only a reference cycle keeps open is not leaked. Cycles through autograd's graph, which an exception
        # inside backward leaves, take more than one collection: each frees what C++ held for the next.
        gc.collect()
        time.sleep(0.01)
        leaked = _new_since(before)
    assert not leaked, "the test leaves behind: " + "; ".join(leaked)


def _new_since(before: _Held) -> list[str]:
    now = _held()
    return [
        f"{word} {key} ({text})"
        for word, old, new in zip(("thread", "file", "process"), before, now, strict=True)
        for key, text in new.items()
        if key not in old or (word == "file" and old[key] != text)  # descriptors are used again, the other numbers not
    ]


def _held() -> _Held:
    return _Held(_threads(), _files(), _children())


def _threads() -> dict[int, str]:
    # A thread of torch's that has run Python code is known there too, as a dummy.
    own = (thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread))
    python_names = {thread.native_id: f"{type(thread).__name__} {thread.name}" for thread in own}
    threads = {}
    for task in os.listdir("/proc/self/task"):
        name = python_names.get(int(task)) or f"native, {_read(f'/proc/self/task/{task}/comm')}"
        # tqdm starts one daemon thread per process at its first bar; torch one per accelerator at the first backward;
        # the optimizer kernels start theirs at the first large update. None of them ends before the process.
        if not name.startswith(("TMonitor ", "native, pt_autograd", "native, cuda", "native, ssd-kernel")):
            threads[int(task)] = name
    return threads


def _files() -> dict[int, str]:
    files = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # the descriptor of this very listing
            continue
        # multiprocessing's resource tracker, a process of its own, is started once and reached through a pipe.
        if int(entry) != resource_tracker._resource_tracker._fd and not _is_of_the_driver(target):
            files[int(entry)] = target
    return files


def _is_of_the_driver(target: str) -> bool:
    """Whether CUDA may have opened it: its devices, and where these are, pipes, sockets and events of its threads."""
    return target.startswith("/dev/nvidia") or (
        _HAS_NVIDIA and target.startswith(("pipe:", "socket:", "anon_inode:[eventfd]", "anon_inode:[eventpoll]"))
    )


def _children() -> dict[int, str]:
    children: dict[int, str] = {}
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # mostly there is none, and no need to look at every process of the machine
        return children
    for entry in filter(str.isdigit, os.listdir("/proc")):
        status = _read(f"/proc/{entry}/stat").rpartition(")")[2].split()  # after the name: state, parent's id, ...
        if len(status) > 1 and status[1] == str(os.getpid()):
            command = _read(f"/proc/{entry}/cmdline").replace("\0", " ").strip() or "a zombie: nobody waited for it"
            # Both serve the process for its whole life: the resource tracker and torch.compile's pool of compilers.
            if "resource_tracker" not in command and "compile_worker" not in command:
                children[int(entry)] = command
    return children


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:  # it ended while we looked
        return ""


# ----------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def tmp_store(tmp_path: Path) -> Iterator[Path]:
    """An empty directory on a disk, removed afterwards. In a tmpfs, where /tmp may be, nothing is ever on disk."""
    for parent in (os.environ.get("LIGHTNING_SSD_TEST_DIR"), tmp_path, REPOSITORY / ".pytest_cache"):
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
            if _file_system(Path(parent)) not in ("tmpfs", "ramfs"):
                break
    else:
        pytest.fail("no disk to test on; set LIGHTNING_SSD_TEST_DIR to a directory on one")
    store = Path(tempfile.mkdtemp(prefix="store-", dir=parent))
    yield store
    shutil.rmtree(store, ignore_errors=True)


def _file_system(path: Path) -> str:
    """Type of the file system that ``path`` is on, such as ``"ext4"``."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [(mount, kind) for mount, kind in mounts if path.resolve().is_relative_to(mount.replace(r"\040", " "))]
    return max(holding, key=lambda mount_kind: len(mount_kind[0]))[1]


# ------------------------------------------------------------------------------------------------- fresh interpreters


@pytest.fixture(scope="session")
def entry_point_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that, when on the path, makes the package's entry point visible, installed or not."""
    info = tmp_path_factory.mktemp("site") / "lightning_ssd-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-ssd\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nlightning_ssd = lightning_ssd._autoload:register\n")
    return info.parent


@pytest.fixture(scope="session")
def fresh_python(entry_point_dir: Path) -> Callable[..., str]:
    """Runs code in an interpreter of its own and returns what it prints; raises with its errors if it fails."""

    def run(
        code: str, *, package: Path = REPOSITORY, path: tuple[Path, ...] = (), installed: bool = True, **env: str
    ) -> str:
        """Run ``code`` with the package in directory ``package``, and torch and Lightning only if ``installed``."""
        site = [entry for entry in sys.path if entry.endswith("-packages")] if installed else []
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("LIGHTNING_SSD", "PL_"))}
        environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
        environment |= env | {"PYTHONPATH": os.pathsep.join(map(str, (*path, package, entry_point_dir, *site)))}
        # -S: without it the hooks of an editable installation come first, whatever the path says.
        command = [sys.executable, "-S", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    return run
