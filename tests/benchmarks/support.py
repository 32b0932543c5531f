"""What every benchmark shares: facts of the machine, one JSON line per result, timed processes, medians."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRIORITY = "-19"  # of an autogroup: as `nice -n -19`, but among sessions


def facts(directory: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Machine and versions now, for the line of a result; with ``directory`` the disk that it is on too."""
    found: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _value_of("/proc/cpuinfo", "model name"),
        "num_cpus": os.cpu_count(),
        "memory_nbytes": int(_value_of("/proc/meminfo", "MemTotal").split()[0]) * 1024,
        "machine": f"{platform.machine()}, Linux {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "commit": _commit(),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
    }
    for package in ("torch", "lightning", "lightning-ssd"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if directory is not None:
        found["disk"] = _disk(Path(directory))
    return found


def emit(line: Mapping[str, Any], out: str | os.PathLike[str] | None) -> None:
    """Write one result to standard output and, if given, append it to the file ``out``."""
    text = json.dumps(rounded(line)) + "\n"
    sys.stdout.write(text)
    sys.stdout.flush()
    if out is not None:
        with Path(out).open("a") as file:
            file.write(text)


def say(message: str) -> None:
    """Progress, apart from results."""
    sys.stderr.write(f"# {datetime.now():%H:%M:%S} {message}\n")
    sys.stderr.flush()


def rounded(value: Any, digits: int = 4) -> Any:
    """``value`` with every float in it rounded."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, Mapping):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner, digits) for inner in value]
    return value


def median(values: Iterable[float]) -> float:
    """Middle value."""
    return statistics.median(values)


def run_json(argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`launch` a program; returns the JSON object that it prints last."""
    process = launch(argv, env=env, stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate()
    finally:
        end(process)
    lines = [line for line in output.decode().splitlines() if line.startswith("{")]
    if process.returncode != 0 or not lines:
        raise SystemExit(f"{' '.join(map(str, argv))} ended with {process.returncode} and {len(lines)} JSON lines")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def in_own_session() -> None:
    """For a program that times in its own process: `launch` it again, unless it runs so already."""
    if os.getsid(0) == os.getpid():
        return
    process = launch([sys.executable, *sys.orig_argv[1:]])
    try:
        raise SystemExit(process.wait())
    finally:
        end(process)


def launch(
    argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a timed program in a session of its own, with priority where we may; `end` it whatever happens.

    With autogroups on, neighbours in other sessions share the cores by session, and ``nice`` changes nothing.
    """
    environment = {**os.environ, **(env or {})}
    process = subprocess.Popen(argv, env=environment, cwd=ROOT, start_new_session=True, **options)
    with suppress(OSError):  # not root, or no autogroups
        Path(f"/proc/{process.pid}/autogroup").write_text(PRIORITY)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that a launched program is over: in another session, Ctrl-C does not reach it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def memory_now() -> tuple[int, int]:
    """Anonymous (RssAnon + RssShmem) and file-mapped memory of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    if "RssAnon" not in kib:  # gVisor does not tell them apart
        return kib["VmRSS"] * 1024, 0
    return (kib["RssAnon"] + kib["RssShmem"]) * 1024, kib["RssFile"] * 1024


def plan_of(session: Any) -> dict[str, Any]:
    """The memory plan of a session of the strategy: bytes by pool, and how much is kept."""
    plan = session.plan
    names = ("host", "smallest", "param", "update", "temporary", "grad", "staging", "in_memory", "queue")
    return {f"{name}_nbytes": getattr(plan, f"{name}_nbytes") for name in names} | {
        "chunk_numel": plan.chunk_numel,
        "depth": plan.depth,
        "fits": plan.fits,
        "num_units": len(session.units),
        "num_in_memory_params": len(plan.in_memory_params),
        "num_in_memory_states": len(plan.in_memory_states),
    }


def _value_of(path: str, key: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "unknown")  # as CPUs of Arm


def _commit() -> str | None:
    """Short hash, with a plus where sources differ from it."""
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return None
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "lightning_ssd", "native"]).returncode
    return head.stdout.strip() + ("+" if changed else "")


def _disk(directory: Path) -> dict[str, Any]:
    """File system and block device of ``directory``."""
    status, space = directory.stat(), os.statvfs(directory)
    number = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    found: dict[str, Any] = {"directory": str(directory), "free_nbytes": space.f_bavail * space.f_frsize}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            found["file_system"], found["device"] = after.split()[:2]
    with suppress(OSError):
        found["scheduler"] = Path(f"/sys/dev/block/{number}/queue/scheduler").read_text().strip()
    return found
