"""The state of a model by name: every unit and kind has one current generation, in an immutable file or in memory.

A new generation is written beside the current one and replaces it by `StateStore.commit`. The file of the old one is
used again for a later generation of the same length, unless a checkpoint, a mapping or a forked process still reads it.

The training thread and the update thread may both use a store; each generation is written by one of them.

[Note: in memory] What the plan holds in memory has no file while it is used. An update changes the memory in place, and
the new generation is the same memory. A file of it is written when one is needed: for a checkpoint, a mapping, the end
of the run. So with enough memory no step touches the disk, and all other code works on files.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from lightning_ssd.codec.encodings import HALVES
from lightning_ssd.errors import Ending, StoreError
from lightning_ssd.io.engine import Engine, IOOptions, Transfer
from lightning_ssd.io.file import File
from lightning_ssd.io.folder import Folder
from lightning_ssd.io.scratch import Scratch
from lightning_ssd.io.select import make_engine
from lightning_ssd.store.disks import Disks
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.generation_files import GenerationFiles
from lightning_ssd.store.layout import UnitLayout
from lightning_ssd.store.run_directory import RunDirectory
from lightning_ssd.store.staging import Source, Staging
from lightning_ssd.trace.recorder import Trace


class StateStore:
    """The current generation of each kind of each unit.

    Args:
        directories: One run directory per disk, used in turn.
        engine: Moves the bytes.
        options: Of the engine that `writable` makes after `suspend`.
        direct: Whether to open files with O_DIRECT, one flag per directory.
        verify: Compare every read with the checksums of what was written.
        trace: Gets spans of reads and writes.

    Attributes:
        disks: Where the files are.
        is_suspended: All files are closed; see `suspend`.
    """

    def __init__(
        self,
        directories: list[RunDirectory],
        engine: Engine,
        *,
        options: IOOptions,
        direct: list[bool],
        verify: bool,
        trace: Trace,
    ) -> None:
        self.disks = Disks(directories, direct)
        self._files = GenerationFiles(self.disks, engine, verify=verify, trace=trace)
        self._staging = Staging(self._files)
        self._in_memory: dict[tuple[str, str], tuple[Tensor, ...]] = {}  # by unit and kind; one tensor per parameter
        self._options = options
        self._lock = threading.Lock()  # of `_current`
        self._current: dict[tuple[str, str], Generation] = {}  # by unit and kind
        self.is_suspended = False

    @property
    def engine(self) -> Engine:
        """Moves the bytes."""
        return self._files.engine

    @property
    def scratches(self) -> list[Scratch]:
        """What creates files without a name, one per disk."""
        return [Scratch(disk.directory.folder, disk.direct, self.engine.patience) for disk in self.disks.all]

    # -- generations ---------------------------------------------------------------------------------------------

    def current(self, unit: str, kind: str) -> Generation | None:
        """The current generation, None if there is none.

        Raises:
            StoreError: Its update in memory failed midway; the message is that of the failure.
        """
        generation = self._current.get((unit, kind))
        if generation is not None and generation.damage:
            raise StoreError(generation.damage)
        return generation

    def newest(self, unit: str, kind: str) -> Generation:
        """The current generation of a kind that must have one, such as the parameters of a unit that was placed.

        Raises:
            StoreError: There is none, or its update in memory failed midway.
        """
        generation = self.current(unit, kind)
        if generation is None:
            raise StoreError(f"unit {unit!r} has no {kind} in the store: the disk failed before it was written")
        return generation

    def state_kinds(self, unit: str) -> list[str]:
        """Kinds of files with optimizer state of which a unit has a generation."""
        return [kind for kind in self.kinds(unit) if kind not in ("param", "master", *HALVES)]

    def kinds(self, unit: str) -> list[str]:
        """Kinds of which ``unit`` has a generation."""
        with self._lock:
            return [kind for name, kind in self._current if name == unit]

    def begin(self, layouts: Sequence[UnitLayout]) -> list[Generation]:
        """New generations, one per layout: files whose data sections are still to be written, with reserved space.

        For a kind that is in memory it is the same memory, to be changed in place.

        Raises:
            StoreError: The disk is full. No file is left behind, as after the other errors.
            IOFailure: The disk failed.
            DeadlineError: The disk did not answer.
        """
        begun = iter(self._files.begin([each for each in layouts if self.in_memory(each.unit, each.kind) is None]))
        in_memory = ((layout, self.in_memory(layout.unit, layout.kind)) for layout in layouts)
        return [next(begun) if found is None else Generation(layout, None, found) for layout, found in in_memory]

    def commit(self, *generations: Generation) -> None:
        """Make completely written generations the current ones, all or none, and retire those that they replace.

        Raises:
            IOFailure: A file could not be named; none is the current one.
            DeadlineError: The disk did not answer.
        """
        for generation in generations:
            generation.end_naming()
        with self._lock:
            previous = [self._current.get((g.layout.unit, g.layout.kind)) for g in generations]
            self._current.update({(g.layout.unit, g.layout.kind): g for g in generations})
            for superseded in previous:
                if superseded is not None:
                    self._files.retire(superseded)
                    superseded.in_memory = None  # those tensors hold the new values

    def abandon(self, generation: Generation, damage: str = "") -> None:
        """Drop a generation that will not be committed. No transfer on it may be in flight.

        Args:
            generation: What `begin` returned.
            damage: If it is in memory: a message why the memory holds neither the old values nor the new ones.
        """
        current = self._current.get((generation.layout.unit, generation.layout.kind))
        if generation.in_memory is not None and current is not None:
            current.damage = damage
        self._files.retire(generation)

    def forget(self, unit: str, kind: str) -> None:
        """Drop the current generation of a kind, as if it had never been written."""
        with self._lock:
            generation = self._current.pop((unit, kind), None)
        if generation is not None:
            self._files.retire(generation)

    def put(self, layout: UnitLayout, source: Source) -> Generation:
        """Write a generation and commit it.

        Args:
            layout: What to write.
            source: Its tensors, of any shape with the right number of elements; converted to the layout's dtype.

        Raises:
            StoreError: The disk is full. The current generation stays, as after the other errors.
            IOFailure: The disk failed.
        """
        tensors = self.in_memory(layout.unit, layout.kind)
        if tensors is None:
            generation = self._staging.write(layout, source)
        else:
            for index, tensor in enumerate(tensors):
                found = source(index)
                tensor.zero_() if found is None else tensor.copy_(found.detach().reshape(tensor.shape))
            generation = Generation(layout, None, tensors)
        self.commit(generation)
        return generation

    # -- in memory: see [Note: in memory] ------------------------------------------------------------------------

    def hold_in_memory(self, layout: UnitLayout, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """From now on hold a kind of a unit in ``tensors``, one per parameter in the layout's strides; returns them.

        The values of the current generation are read into them; if there is none, they keep what they hold.

        Raises:
            IOFailure: The disk failed.
        """
        current, held = self._current.get((layout.unit, layout.kind)), tuple(tensors)
        if current is not None:
            self._staging.read(current, held)
            current.in_memory = held
        return self.replace_in_memory(layout, held)

    def replace_in_memory(self, layout: UnitLayout, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """From now on hold a kind in ``tensors``, which the next `put` fills; returns them."""
        self._in_memory[layout.unit, layout.kind] = held = tuple(tensors)
        return held

    def in_memory(self, unit: str, kind: str) -> tuple[Tensor, ...] | None:
        """The tensors of a kind of a unit, one per parameter in file order; None if it is not in memory."""
        return self._in_memory.get((unit, kind))

    def on_disk(self, generation: Generation) -> Generation:
        """``generation``, after its values in memory were written to a file if it had none.

        Raises:
            StoreError: The disk is full.
            IOFailure: The disk failed.
        """
        if generation.in_memory is not None and not generation.has_file:
            written = self._staging.write(generation.layout, generation.in_memory.__getitem__)
            generation.file, generation.checks = written.file, written.checks
        return generation

    def drop_file(self, generation: Generation) -> None:
        """Retire the file of a generation in memory: the memory may have been written to since."""
        if generation.in_memory is not None and generation.has_file:
            self._files.retire(generation)
            generation.detach()

    def flush_in_memory(self) -> None:
        """Write everything that is in memory to files, and forget the memory.

        Raises:
            StoreError: The disk is full.
            IOFailure: The disk failed.
        """
        for generation in self._current.values():
            if not generation.damage:
                self.on_disk(generation)
            generation.in_memory = None
        self._current = {key: g for key, g in self._current.items() if not g.damage}
        self._in_memory.clear()

    # -- bytes ---------------------------------------------------------------------------------------------------

    def read(self, generation: Generation, offset: int, address: int, nbytes: int, *, keep: object = None) -> Transfer:
        """Start to read ``nbytes`` at ``offset`` of the data section; if the store verifies, waiting checks them.

        Args:
            generation: What to read.
            offset: A multiple of `CHECK_NBYTES`.
            address: Where the bytes go; the memory reaches up to the next multiple of 4096.
            nbytes: How many.
            keep: Held until the transfer is over.
        """
        return self._files.read(generation, offset, address, nbytes, keep)

    def write(self, generation: Generation, offset: int, address: int, nbytes: int, *, keep: object = None) -> Transfer:
        """Start to write ``nbytes`` at ``offset`` of the data section of a generation that is not committed yet.

        Args:
            generation: What to write.
            offset: A multiple of `CHECK_NBYTES`.
            address: Where the bytes are.
            nbytes: How many: a multiple of `CHECK_NBYTES`, or up to the end.
            keep: Held until the transfer is over.
        """
        return self._files.write(generation, offset, address, nbytes, keep)

    def map(self, generation: Generation, *, private: bool) -> mmap.mmap:
        """Map the whole file, writable; works after `suspend` too.

        As long as the mapping lives, the file is not written again: a view that the user keeps shows the values it had.

        Args:
            generation: What to map. If it is in memory, a file is written of it, and writes to the mapping go nowhere.
            private: Writes stay in memory and never reach the file.

        Raises:
            StoreError: The run is over and its files are gone.
            IOFailure: The file cannot be mapped.
        """
        return self._files.map(self.on_disk(generation), private=private)

    def stat(self, generation: Generation) -> os.stat_result:
        """The status of a generation's file; works after `suspend` too.

        Raises:
            StoreError: The run is over and its files are gone, or they were removed.
        """
        return self._files.stat(generation)

    # -- room and end --------------------------------------------------------------------------------------------

    def recycle(self, path: str, folder: Folder | None = None) -> bool:
        """Take a file that nothing else links, such as one of a removed checkpoint, for later generations.

        Args:
            path: The file.
            folder: The directory it is in, open.

        Returns:
            Whether it is gone from there. It stays if it is open or mapped, in this process or another (an
            evaluation of the checkpoint, a tensor that the user kept), if it is not a plain file that this user alone
            may write, or if no generation has its length or there are enough spare files of it.

        Raises:
            IOFailure: The disk failed.
        """
        file = File(path, 0, direct_fd=-1, tail_fd=-1, writable=True, folder=folder)
        found = file.stat()
        num_alike = sum(g.has_file and g.file.nbytes == found.st_size for g in list(self._current.values()))
        return not self.is_suspended and self._files.spare.recycle(file, found, most=num_alike)

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes of all current generations and of files waiting to be written again."""
        with self._lock:
            return self._files.spare.nbytes + sum(g.file.nbytes for g in self._current.values() if g.has_file)

    def suspend(self) -> None:
        """Close the files of all generations and remove spare ones. A second call does nothing."""
        self.flush_in_memory()
        with Ending() as ending:
            for generation in self._current.values():
                ending.callback(generation.file.close)
            ending.callback(self._files.spare.remove)
            self.is_suspended = True

    @contextmanager
    def writable(self) -> Iterator[None]:
        """Inside, generations can be written: after `suspend` with all files open and an engine of its own."""
        if not self.is_suspended:
            yield
            return
        self._files.engine = make_engine(self._options)
        self.is_suspended = False
        try:
            for generation in self._current.values():
                generation.file = self.disks.of(generation.file).open(generation.file.path)
            yield
        finally:
            self.suspend()
            self.engine.close()

    def close(self, *, remove: bool) -> None:
        """Close all files; with ``remove`` delete the run directories. The engine is not closed."""
        for generation in self._current.values():
            if generation.has_file:
                generation.file.close()
        self._current.clear()
        self._files.spare.close()
        self.disks.close(remove=remove)

    # -- forked processes ----------------------------------------------------------------------------------------

    def pass_on(self, kind: str) -> None:
        """Let a process that is forked next read all generations of ``kind``, and what is mapped, at any later time."""
        with self._lock:
            self._files.pass_on([g for (_, other), g in self._current.items() if other == kind])

    def inherit(self, kind: str) -> None:
        """In a forked process: keep the files of ``kind``, to be mapped, and close all others.

        Nothing can be read or written any more, and this process does not keep the parent's run directories locked.
        """
        self._files.is_inherited = True
        if self.is_suspended:
            return
        for (_, other), generation in self._current.items():
            if other != kind and generation.has_file:
                generation.file.close()
        self._files.spare.close()
        self.disks.close(remove=False)
