"""Builds the native module by any Python that has what it takes, without a network, and leaves that Python as it is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "build" / "gpu"
LIMIT_S, INTERRUPT_S = 240, 20
PIP_INSTALL = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade")


def build() -> dict[str, Any]:
    """Put the module where the sources are; the line that tells of it."""
    line: dict[str, Any] = {"part": "build"}
    if os.environ.get("GPU_DEVICE"):  # see `tests.gpu.device`
        return line | {"left_out": "the environment of the tests has it"}
    begin = time.monotonic()
    output, _ = call([sys.executable, *PIP_INSTALL, "--target", str(TARGET), "."], LIMIT_S)
    modules = list((TARGET / "lightning_ssd").glob("_native*.so"))
    for module in modules:
        shutil.copy(module, ROOT / "lightning_ssd")
    line |= {"took_s": time.monotonic() - begin, "has_native": bool(modules)}
    return line if modules else line | {"error": output[-3000:]}


def call(command: list[str], seconds: float, **environment: str) -> tuple[str, bool]:
    """All output of a program, and whether it ended in time; else it is interrupted, and killed if it goes on."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        return process.communicate(timeout=max(seconds, 1.0))[0], True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then writes its report
    try:
        return process.communicate(timeout=INTERRUPT_S)[0], False
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0], False
