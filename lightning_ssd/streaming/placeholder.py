"""What parameters at rest view: one mapped file of NaN bytes, as large as the largest unit, shared by all."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

from torch import Tensor

from lightning_ssd.io.engine import File
from lightning_ssd.memory.views import Views
from lightning_ssd.sizes import MiB
from lightning_ssd.streaming.unit import Unit


def placeholders(units: Sequence[Unit], directory: str) -> dict[str, tuple[Tensor, ...]]:
    """Tensors of the parameters' shapes for every unit, by unit name; they cost no memory unless something reads them.

    Every byte is 0xFF, NaN in each floating dtype: an operation that got past the fence would not go unnoticed.
    """
    nbytes = max([unit.layout.buffer_nbytes for unit in units], default=1)
    path = os.path.join(directory, "placeholder.safetensors")
    file = File.create(path, nbytes, direct=False)
    os.unlink(path)
    ones = b"\xff" * MiB
    for begin in range(0, nbytes, MiB):
        os.pwrite(file.tail_fd, ones[: nbytes - begin], begin)
    os.posix_fadvise(file.tail_fd, 0, 0, os.POSIX_FADV_DONTNEED)
    memory = mmap.mmap(file.tail_fd, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    file.close()
    views = Views(memory)
    return {
        unit.name: tuple(
            views.tensor(place, unit.dtype, shape.shape)
            for place, shape in zip(unit.layout.places, unit.shapes, strict=True)
        )
        for unit in units
    }
