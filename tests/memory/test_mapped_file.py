"""Mapped files whose pages cannot be read: an error in Python. A file cut short does what a bad disk does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_ssd.errors import IOFailure
from lightning_ssd.memory.mapped_file import flush, handle_bus_errors, map_file
from lightning_ssd.memory.views import Views
from lightning_ssd.sizes import MiB


def test_a_page_that_cannot_be_read_is_named_and_never_a_plausible_value(tmp_store: Path) -> None:
    handle_bus_errors()
    path = str(tmp_store / "file")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 8 * MiB)
    memory = map_file(fd, 8 * MiB, path, lambda offset: f"the value at {offset // MiB} MiB")
    values = Views(memory).tensor(0, torch.float32, (2 * MiB,))
    assert values.sum() == 0
    os.ftruncate(fd, 4 * MiB)
    os.close(fd)
    with pytest.raises(IOFailure, match=r"read of the value at 4 MiB.*'.*/file' failed: Input/output error"):
        print(float(values[MiB : MiB + 10].sum()))
    assert values[:MiB].sum() == 0  # what can be read is as before
    assert torch.isnan(values[MiB : MiB + 1000]).all()
    flush(memory, path)


def test_the_signal_of_somebody_else_ends_the_process_as_before(fresh_python: Callable[..., str]) -> None:
    code = """
import mmap, os, tempfile
from lightning_ssd.memory.mapped_file import handle_bus_errors
handle_bus_errors()
with tempfile.TemporaryFile() as file:
    file.truncate(8192)
    memory = mmap.mmap(file.fileno(), 8192)
    file.truncate(0)
    memory[0]
"""
    with pytest.raises(AssertionError, match="exit status -7"):
        fresh_python(code)
