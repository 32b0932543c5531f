"""Tensors to files of generations and back, through a small buffer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_ssd.memory.plan import STAGING_NBYTES
from lightning_ssd.memory.pool import Pool
from lightning_ssd.store.decoded import values_of
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.generation_files import GenerationFiles
from lightning_ssd.store.layout import UnitLayout, chunks

Source = Callable[[int], Tensor | None]
"""Gives the tensor of each parameter of a unit, by its index, of any dtype; None stands for zeros."""


class Staging:
    """One buffer of `STAGING_NBYTES`, used by one thread at a time.

    Args:
        files: Files that it reads and writes.
    """

    def __init__(self, files: GenerationFiles) -> None:
        self._files = files
        self._pool = Pool(STAGING_NBYTES, "staging")
        self._lock = threading.Lock()  # the update thread writes states that were created late through it too

    def write(self, layout: UnitLayout, source: Source) -> Generation:
        """A new file of the tensors of ``source``, converted to the layout's dtype; nothing has replaced the old one.

        Raises:
            StoreError: The disk is full. No file is left behind, as after the other errors.
            IOFailure: The disk failed.
            ResidencyError: This is a forked process.
        """
        self._files.require_own(layout)  # before the lock, which a thread may have held at the fork
        with self._lock:
            (generation,) = self._files.begin([layout])
            try:
                generation.end_naming()
                self._write_chunks(generation, source)
            except BaseException:
                self._files.retire(generation)
                raise
            return generation

    def read(self, generation: Generation, tensors: Sequence[Tensor]) -> None:
        """Read a generation into ``tensors``, one per parameter in the layout's strides, converted to their dtype.

        Raises:
            IOFailure: The disk failed.
            CorruptionError: The bytes are not those that were written.
            ResidencyError: This is a forked process.
        """
        self._files.require_own(generation.layout)
        with self._lock:
            self._read_chunks(generation, tensors)

    def _write_chunks(self, generation: Generation, source: Source) -> None:
        layout, dtype = generation.layout, dtype_of(generation.layout.dtype)
        buffer = self._pool.lend(STAGING_NBYTES, f"staging of {layout.unit}")
        staged: Tensor | None = None
        part: Tensor | None = None
        try:
            index, flat = -1, None  # of the parameter that is copied now: source is asked once for each
            for begin, end in chunks(layout.numel, STAGING_NBYTES // layout.itemsize):
                staged = buffer.tensor(0, dtype, (end - begin,))
                for segment in layout.segments(begin, end):
                    if segment.index != index:
                        index, found = segment.index, source(segment.index)
                        flat = None if found is None else layout.entries[index].flatten(values_of(found).detach())
                    part = staged[segment.begin - begin : segment.end - begin]
                    if flat is None:
                        part.zero_()
                    else:
                        part.copy_(flat[segment.offset : segment.offset + segment.numel])
                offset = begin * layout.itemsize
                self._files.write(generation, offset, buffer.address, staged.nbytes, staged).wait()  # sync: staging
        finally:
            staged = part = None  # an error keeps this frame, and tensors in it would keep the buffer in use
            self._pool.give_back(buffer)

    def _read_chunks(self, generation: Generation, tensors: Sequence[Tensor]) -> None:
        layout, dtype = generation.layout, dtype_of(generation.layout.dtype)
        buffer = self._pool.lend(STAGING_NBYTES, f"staging of {layout.unit}")
        staged: Tensor | None = None
        try:
            for begin, end in chunks(layout.numel, STAGING_NBYTES // layout.itemsize):
                staged = buffer.tensor(0, dtype, (end - begin,))
                offset = begin * layout.itemsize
                self._files.read(generation, offset, buffer.address, staged.nbytes, staged).wait()  # sync: staging
                for segment in layout.segments(begin, end):
                    flat = layout.entries[segment.index].flatten(tensors[segment.index])
                    part = flat[segment.offset : segment.offset + segment.numel]
                    part.copy_(staged[segment.begin - begin : segment.end - begin])
        finally:
            staged = None  # as above
            self._pool.give_back(buffer)
