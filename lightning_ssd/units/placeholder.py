"""What lazy parameters view: NaN bytes that take no memory.

On the CPU they are one mapped file, as large as the largest unit, shared by all. On a GPU they are one element of the
device, seen with stride 0: so ``.data`` of a parameter stays on one device while a step runs. Torch would give it a new
place in the graph, and end the one that it had, whenever its device changes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from lightning_ssd.io.file import File
from lightning_ssd.io.scratch import Scratch, write_all
from lightning_ssd.memory.mapped_file import map_file
from lightning_ssd.memory.views import Views
from lightning_ssd.sizes import MiB
from lightning_ssd.units.unit import Unit


def make_placeholders(units: Sequence[Unit], scratch: Scratch, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """Tensors of the parameters' shapes on ``device`` for every unit, by unit name; they take no memory unless read.

    Every byte is 0xFF, NaN in each floating dtype: an operation that reads them by mistake is noticed.
    """
    return _on_host(units, scratch) if device.type == "cpu" else _on_device(units, device)


def _on_device(units: Sequence[Unit], device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    with torch.inference_mode(False):
        elements = {dtype: _element(dtype, device) for dtype in {unit.dtype for unit in units}}
        return {unit.name: tuple(elements[unit.dtype].expand(s.shape) for s in unit.shapes) for unit in units}


def _element(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((dtype.itemsize,), 0xFF, dtype=torch.uint8, device=device).view(dtype).squeeze(0)


def _on_host(units: Sequence[Unit], scratch: Scratch) -> dict[str, tuple[Tensor, ...]]:
    nbytes = max([unit.layout.buffer_nbytes for unit in units], default=1)
    file = scratch.make("placeholder.safetensors", nbytes)
    try:
        scratch.patience.call(lambda: _fill(file), file.path, "write")
        memory = map_file(file.tail_fd, nbytes, file.path, lambda offset: "what stands for parameters", private=True)
    finally:
        file.close()
    views = Views(memory)
    return {
        unit.name: tuple(
            views.tensor(place, unit.dtype, shape.shape, shape.stride)
            for place, shape in zip(unit.layout.places, unit.shapes, strict=True)
        )
        for unit in units
    }


def _fill(file: File) -> None:
    ones = b"\xff" * MiB
    for begin in range(0, file.nbytes, MiB):
        write_all(file, ones[: file.nbytes - begin], begin)
    with suppress(OSError):  # advice
        os.posix_fadvise(file.tail_fd, 0, 0, os.POSIX_FADV_DONTNEED)
