"""Runs the examples as a newcomer does: ``python -m tests.soak.fresh_examples``.

A copy of the source tree, a fresh environment, and the commands of ``examples/README.md`` and of the pages below it,
in their order. The first command that fails ends the run with the last lines of its errors.
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

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("examples/README.md", "examples/vision_dali/README.md")
_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands_of(page: Path) -> list[str]:
    """The lines of a page's bash blocks."""
    return [line for block in _BLOCK.findall(page.read_text()) for line in block.splitlines() if line.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """0: every command worked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".examples", help="is made anew, and removed in the end")
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement that pip is held to")
    parser.add_argument("--python", default=sys.executable, help="makes the environment")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder.resolve()
    tree = copy_tree(folder)
    subprocess.run([arguments.python, "-m", "venv", str(folder / "venv")], check=True)
    (folder / "constraints.txt").write_text(arguments.torch + "\n")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["PATH"] = f"{folder / 'venv' / 'bin'}{os.pathsep}{env['PATH']}"
    env["PIP_CONSTRAINT"] = str(folder / "constraints.txt")
    is_good = all(run_page(tree, page, env) for page in PAGES)
    if is_good and not arguments.keep:
        shutil.rmtree(folder)
    return 0 if is_good else 1


def copy_tree(folder: Path) -> Path:
    """What is tracked by git, or would be, as a newcomer unpacks it."""
    shutil.rmtree(folder, ignore_errors=True)
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree" / name)
    return folder / "tree"


def run_page(tree: Path, page: str, env: dict[str, str]) -> bool:
    """Run a page's commands, in one shell after the other, and say what became of each."""
    here = tree
    for command in commands_of(tree / page):
        if command.startswith("cd "):
            here = tree / command.removeprefix("cd ")
            continue
        done = subprocess.run(command, shell=True, cwd=here, env=env, capture_output=True, text=True, check=False)
        lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
        shown = lines[-1:] if done.returncode == 0 else lines[-20:]
        sys.stdout.write(f"{'ok' if done.returncode == 0 else 'FAILED'}  {command}\n")
        sys.stdout.writelines(f"        {line}\n" for line in shown)
        sys.stdout.flush()
        if done.returncode:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
