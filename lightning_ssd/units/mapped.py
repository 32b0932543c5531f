"""Values of a unit outside a step: tensors on a mapping of its file, and whether the user wrote to them.

[Note: mapped values] A file that no checkpoint names is mapped shared: what the user writes lands in it. Its
modification time is set back by two to four seconds when it is mapped, to one that no write to come can have; so
another one found later, after `msync`, means a write. A file that a checkpoint names, or that a forked process may
read, or that is one half of masters, is mapped private: what the user writes stays in memory, on pages that no longer
belong to the file, which bit 61 of ``/proc/self/pagemap`` tells. Assigning ``p.data`` is seen by the address.
Optimizer state is always mapped private: it is shown, and a checkpoint must still be able to link its file. A unit in
memory is shown as it is: what the user writes is its value. Only a 16-bit one, which has a master beside it, has to
notice: its checksum is compared.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_ssd.codec.encodings import HALVES
from lightning_ssd.errors import as_io_failure
from lightning_ssd.memory.forked import make_private
from lightning_ssd.memory.mapped_file import flush
from lightning_ssd.memory.views import Views, address_of
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import UnitLayout
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.fingerprint import Fingerprint, fingerprint

_PAGE = mmap.PAGESIZE
_EVEN_NS = 2 * 10**9  # some file systems store times in steps of two seconds
_FILE_PAGE = 1 << 61
_PRESENT_OR_SWAPPED = (1 << 63) | (1 << 62)


_mappings: weakref.WeakSet[MappedParams] = weakref.WeakSet()  # those of ended sessions, too


def snapshot(store: StateStore, generation: Generation) -> tuple[Tensor, ...]:
    """The tensors of a generation, one per parameter in file order, mapped: what is written to them goes nowhere."""
    return _tensors(Views(store.map(generation, private=True)), generation.layout)


class MappedParams:
    """One mapping of a generation, with a tensor for each parameter.

    Attributes:
        generation: What is mapped.
        tensors: One per parameter, in file order, each with a storage of its own.
    """

    def __init__(self, store: StateStore, generation: Generation) -> None:
        self.generation = store.on_disk(generation)
        file = generation.file  # by its name, not its descriptor: after a run the store has closed its files
        found = store.stat(generation)
        layout = generation.layout
        # The values before a write are one half of masters.
        is_half = any(kind in HALVES for kind in store.kinds(layout.unit))
        self.is_private = layout.kind != "param" or is_half or found.st_nlink > 1 or generation.is_inherited
        self._was_written = False  # while it was shared
        self._checks = list(generation.checks)
        self._memory = store.map(generation, private=self.is_private)
        if not self.is_private:
            if found.st_mtime_ns % _EVEN_NS:  # else it was set back before, and nothing was written since
                file.date((found.st_mtime_ns // _EVEN_NS - 1) * _EVEN_NS)
            self._dated_ns = file.stat().st_mtime_ns
        self._views = Views(self._memory)
        self.tensors = _tensors(self._views, generation.layout)
        _mappings.add(self)

    def is_assigned(self, params: Sequence[nn.Parameter]) -> bool:
        """Whether the user gave a parameter other memory (``p.data = ...``) than the mapping."""
        return is_assigned(params, self.tensors)

    def was_written(self) -> bool:
        """Whether the user wrote into the mapping. For a shared one, everything written is in the file afterwards."""
        if self.is_private:
            return self._was_written or self._has_private_pages()
        flush(self._memory, self.generation.file.path)  # so that the file's time tells of every write
        return self.generation.file.stat().st_mtime_ns != self._dated_ns

    def make_private(self) -> None:
        """A process is about to be forked: from now on neither sees what the other writes, as with any memory.

        Raises:
            IOFailure: The file cannot be mapped again.
        """
        if self.is_private:
            return
        file = self.generation.file
        self._was_written = self.was_written()
        with as_io_failure(file.path, 0, file.nbytes, "mapping"):
            fd = file.open_again(os.O_RDWR) if file.closed else os.dup(file.tail_fd)
            try:
                make_private(self._memory, fd)
            finally:
                os.close(fd)
        self.is_private = True
        if not self._was_written:
            self.generation.is_mapped = False
            self.generation.checks = self._checks

    def unmap(self, *, is_written: bool) -> None:
        """The parameters view something else now. A file that was only read, and that nobody views, is as before."""
        self.tensors = ()
        if not (self.is_private or is_written or self._views.in_use):
            self.generation.is_mapped = False
            self.generation.checks = self._checks

    def _has_private_pages(self) -> bool:
        first = address_of(self._memory) // _PAGE
        num_pages = -(-len(self._memory) // _PAGE)
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(first * 8)
            flags = memoryview(pagemap.read(num_pages * 8)).cast("Q")
        return any(flag & _PRESENT_OR_SWAPPED and not flag & _FILE_PAGE for flag in flags)


class InMemoryParams:
    """The same of a unit that the plan holds in memory.

    Attributes:
        generation: What is shown.
        tensors: One per parameter, in file order.
    """

    is_private = False

    def __init__(self, generation: Generation, tensors: tuple[Tensor, ...]) -> None:
        self.generation = generation
        self.tensors = tensors
        self._has_master = generation.layout.itemsize < 4
        self._seen = self._content()

    def is_assigned(self, params: Sequence[nn.Parameter]) -> bool:
        """See `MappedParams.is_assigned`."""
        return is_assigned(params, self.tensors)

    def was_written(self) -> bool:
        """Whether the user wrote to parameters that have a master; others need not know."""
        return self._seen != self._content()

    def unmap(self, *, is_written: bool) -> None:
        """See `MappedParams.unmap`."""

    def _content(self) -> Fingerprint:
        return fingerprint(self.tensors) if self._has_master else ()


def tensors_of_mappings() -> Counter[int]:
    """How many tensors mappings have, by address: those of ended sessions show parameters that a new one places."""
    shown = (tensor for mapping in list(_mappings) for tensor in mapping.tensors)
    return Counter(address for t in shown for address in [t.data_ptr()] * (1 + (t._base is not None)))


def is_assigned(params: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> bool:
    """Whether a parameter views other memory than its tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return any(p.data_ptr() != t.data_ptr() for p, t in zip(params, tensors, strict=True) if t.numel())


def _tensors(views: Views, layout: UnitLayout) -> tuple[Tensor, ...]:
    dtype = dtype_of(layout.dtype)
    begin = layout.data_begin
    return tuple(views.tensor(begin + entry.begin, dtype, entry.shape, entry.stride) for entry in layout.entries)
