"""Trains models of packages built on Lightning: ``python -m tests.packages``, or ``make packages``.

Each file of ``requirements/`` becomes an environment with the packages it names, pinned, and our package as the source
distribution builds it. In it `tests.packages.compare` runs the scripts that the file names in its first lines. The
lines of JSON go to ``docs/results/packages.jsonl``, from which the table in ``docs/compatibility.md`` is made.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.soak.versions import ROOT, build_sdist, copy_tests

REQUIREMENTS = Path(__file__).with_name("requirements")
RESULTS = ROOT / "docs" / "results" / "packages.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """0: every model was equal; 1: some were not, failed, or could not be installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", help="names of files in requirements/; default all")
    parser.add_argument("--folder", type=Path, default=ROOT / ".packages", help="where environments are made")
    parser.add_argument("--python", default=sys.executable, help="makes the environments")
    parser.add_argument("--keep", action="store_true", help="leave the environments (3 GB each) for the next time")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        file for file in sorted(REQUIREMENTS.glob("*.txt")) if file.stem in (arguments.environments or [file.stem])
    ]
    sdist, tree = build_sdist(folder), copy_tests(folder)
    lines, is_good = [], bool(files)
    for file in files:
        python = make_environment(file, folder / file.stem, sdist, arguments.python)
        for module in scripts_of(file):
            out = folder / f"{module}.jsonl"
            out.unlink(missing_ok=True)
            is_good &= run(python, module, tree, out)
            lines += out.read_text().splitlines(keepends=True) if out.exists() else []
        if not arguments.keep:
            shutil.rmtree(folder / file.stem)
    if not arguments.environments:
        RESULTS.write_text("".join(lines))
    return 0 if is_good else 1


def scripts_of(file: Path) -> list[str]:
    """The modules that a file of requirements names: ``# scripts: with_darts with_scvi``."""
    return [name for line in re.findall(r"^# scripts: (.*)$", file.read_text(), re.MULTILINE) for name in line.split()]


def make_environment(file: Path, folder: Path, sdist: Path, python: str) -> Path:
    """An environment with these requirements and our package. Returns its interpreter."""
    executable = folder / "bin" / "python"
    pip = [str(executable), "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--requirement", str(file)]
    for step in ([python, "-m", "venv", str(folder)], install, [*install, str(sdist)], [*pip, "check"]):
        subprocess.run(step, check=True)
    return executable


def run(python: Path, module: str, tree: Path, out: Path) -> bool:
    """Run one script; its output goes to a file beside ``out``. Returns whether all was equal."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-m", "tests.packages.compare", module, "--out", str(out)]
    with out.with_suffix(".log").open("w") as log:
        is_good = subprocess.run(command, stdout=log, stderr=log, cwd=tree, env=clean, check=False).returncode == 0
    sys.stdout.write(f"{'ok' if is_good else 'FAILED, see ' + log.name}  {module}\n")
    sys.stdout.flush()
    return is_good


if __name__ == "__main__":
    sys.exit(main())
