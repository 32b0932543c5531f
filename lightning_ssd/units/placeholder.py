"""What lazy parameters view: one mapped file of NaN bytes, as large as the largest unit, shared by all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor

from lightning_ssd.io.file import File
from lightning_ssd.io.scratch import Scratch, write_all
from lightning_ssd.memory.mapped_file import map_file
from lightning_ssd.memory.views import Views
from lightning_ssd.sizes import MiB
from lightning_ssd.units.unit import Unit


def make_placeholders(units: Sequence[Unit], scratch: Scratch) -> dict[str, tuple[Tensor, ...]]:
    """Tensors of the parameters' shapes for every unit, by unit name; they cost no memory unless something reads them.

    Every byte is 0xFF, NaN in each floating dtype: an operation that reads them by mistake is noticed.
    """
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
            views.tensor(place, unit.dtype, shape.shape)
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
