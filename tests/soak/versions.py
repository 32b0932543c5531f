"""Runs a core of the tests on the oldest and the newest torch and Lightning: ``python -m tests.soak.versions``.

For each pair an environment of its own gets the wheel that the source distribution builds, as a user would, and the
tests run beside that wheel, not in the source tree. What could not be installed here is said, and is no success.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "torch==2.8.0,lightning==2.5.0"  # what pyproject.toml promises
NEWEST = "torch,lightning"  # what pip finds
CORE = (
    "tests/io/test_engines.py",
    "tests/memory",
    "tests/optim",
    "tests/store",
    "tests/kernels/test_kernels.py",
    "tests/units/test_lazy_param.py",
    "tests/step/test_in_step.py",
    "tests/step/test_order.py",
    "tests/units/test_partition.py",
    "tests/parity/test_equal_training.py",
    "tests/parity/test_any_plan.py",
    "tests/checkpoint/test_save_load.py",
    "tests/strategy/test_checkpoints.py",
    "tests/strategy/test_cli_config.py",
    "tests/strategy/test_lifecycle.py",
    "tests/strategy/test_resume.py",
    "tests/strategy/test_scaler.py",
)
NEEDED = ("pytest", "hypothesis", "psutil", "safetensors", "jsonargparse[signatures]", "torchmetrics")
SHOW = (
    "import platform, torch, lightning; "
    "print(platform.python_version(), torch.__version__, lightning.__version__, sep='\\n')"
)


@dataclass
class Outcome:
    """What became of one pair."""

    asked: str
    python: str = "-"
    torch: str = "-"
    lightning: str = "-"
    tests: str = ""
    is_installed: bool = False
    is_good: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """0: every pair passed; 1: tests failed; 2: none failed, but a pair could not be installed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", default=[OLDEST, NEWEST], help="requirements joined by commas")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="where environments are made")
    parser.add_argument("--python", default=sys.executable, help="makes the environments")
    parser.add_argument("--keep", action="store_true", help="leave the environments (6 GB each) for the next time")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    sdist = build_sdist(arguments.folder)
    tree = copy_tests(arguments.folder)
    outcomes = []
    for asked in arguments.pairs:
        environment = arguments.folder / re.sub(r"[^\w.,]+", "-", asked)
        outcomes.append(run(asked, environment, sdist, tree, arguments.python))
        if not arguments.keep:
            shutil.rmtree(environment, ignore_errors=True)
    table(outcomes)
    if any(outcome.is_installed and not outcome.is_good for outcome in outcomes):
        return 1
    return 0 if all(outcome.is_good for outcome in outcomes) else 2


def build_sdist(folder: Path) -> Path:
    """The source distribution, as it would be uploaded."""
    shutil.rmtree(folder / "dist", ignore_errors=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return next((folder / "dist").glob("*.tar.gz"))


def copy_tests(folder: Path) -> Path:
    """The tests, and the pages whose code they run, without the package: so they import the one that is installed."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for part in ("tests", "docs"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def run(asked: str, environment: Path, sdist: Path, tree: Path, python: str) -> Outcome:
    """Install and test one pair."""
    outcome = Outcome(asked)
    executable = environment / "bin" / "python"
    log = environment.with_name(environment.name + ".log")
    pip = [str(executable), "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", *asked.split(",")]
    steps = [[python, "-m", "venv", str(environment)], [*pip, "uninstall", "--yes", "lightning-ssd"], install]
    steps += [[*install, str(sdist), *NEEDED], [*pip, "check"]]
    with log.open("w") as out:
        for step in steps:
            if subprocess.run(step, check=False, stdout=out, stderr=subprocess.STDOUT).returncode:
                outcome.tests = f"NOT RUN, could not be installed: {_last(log)}"
                return outcome
        outcome.is_installed = True
        found = subprocess.run([str(executable), "-c", SHOW], check=True, capture_output=True, text=True, cwd=tree)
        outcome.python, outcome.torch, outcome.lightning = found.stdout.split()[-3:]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        tests = [str(executable), "-m", "pytest", "-q", "-m", "not soak and not cuda", *CORE]
        outcome.is_good = all(
            subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=tree, env=clean).returncode == 0
            for command in ([str(executable.with_name("lightning-ssd")), "--version"], tests)
        )
    outcome.tests = ("" if outcome.is_good else f"FAILED, see {log}: ") + _last(log)
    return outcome


def _last(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return (errors or lines[-1:] or [""])[0][:120]


def table(outcomes: Sequence[Outcome]) -> None:
    """Say what became of each."""
    rows = [("python", "torch", "lightning", "core of the tests")]
    rows += [(o.python, o.torch, o.lightning, f"{o.asked}: {o.tests}") for o in outcomes]
    for row in rows:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, (8, 12, 10, 0), strict=True)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
