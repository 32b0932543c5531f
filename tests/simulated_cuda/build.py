"""Builds the simulated device's native module with a C++ compiler and torch's headers, nothing else.

    python -m tests.simulated_cuda.build

It takes about a minute. Without a compiler one line says so, and the tests that need the device are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "build" / "simulated_cuda"
MODULE = OUT / f"_simulated_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


def build(compiler: str) -> None:
    """Compile all sources as one, which reads torch's headers once, and replace the module when that has succeeded."""
    OUT.mkdir(parents=True, exist_ok=True)
    sources = sorted((HERE / "native").glob("*.cpp"))
    unity = OUT / "unity.cpp"
    unity.write_text("".join(f'#include "{source}"\n' for source in sources))
    made = MODULE.with_suffix(".new")
    torch = _torch_directory()
    include = [torch / "include", torch / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-D_GLIBCXX_USE_CXX11_ABI=1"]
    command += [flag for directory in include for flag in ("-isystem", str(directory))]
    command += ["-Wall", "-Wextra", "-Wno-unused-parameter", str(unity), "-o", str(made)]
    command += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-ltorch", f"-Wl,-rpath,{torch / 'lib'}"]
    subprocess.run(command, check=True)
    made.replace(MODULE)


def _torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")  # not imported: that takes longer than finding it
    if spec is None or spec.origin is None:
        raise SystemExit("simulated CUDA: torch is not installed")
    return Path(spec.origin).parent


def main() -> None:
    """Build it if there is a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        print("simulated CUDA: not built, there is no g++; tests on it are skipped", file=sys.stderr)
        return
    build(compiler)


if __name__ == "__main__":
    main()
