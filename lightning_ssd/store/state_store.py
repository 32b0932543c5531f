"""Named state: every unit and kind has one current generation, an immutable safetensors file or memory that is kept.

A new generation is written beside the current one and takes its place by `commit`; the superseded file is recycled for
the next generation of the same size, or only unlinked if a checkpoint or a mapping still names it.

[Note: kept] What the plan keeps in memory has no file while it is used: an update changes the memory in place, and the
new generation is the same memory. `StateStore.on_disk` writes a file of it when somebody wants one: a checkpoint, a
mapping, the end of the run. So with memory to spare no step touches the disk, and everything else works on files.

Safe to use from the thread that trains and the one that updates; a generation is written by one of them.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import re
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from lightning_ssd.errors import Ending, IOFailure, ResidencyError, StoreError, as_io_failure, gone
from lightning_ssd.io.engine import Engine, File, Transfer
from lightning_ssd.io.folder import Folder, close_fd, device_of, is_own_file
from lightning_ssd.io.scratch import Scratch, write_all
from lightning_ssd.kernels.api import crc32c_each, is_native
from lightning_ssd.memory.mapped_file import map_file
from lightning_ssd.memory.plan import STAGING_NBYTES
from lightning_ssd.memory.pool import Pool
from lightning_ssd.sizes import BLOCK_NBYTES, fmt
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.generation import CheckedRead, Generation
from lightning_ssd.store.layout import CHECK_NBYTES, UnitLayout, chunks
from lightning_ssd.store.run_directory import RunDirectory
from lightning_ssd.trace.recorder import Lane, Trace


class StateStore:
    """Generations on one or several disks.

    Args:
        directories: One per disk, used in turn.
        engine: Moves the bytes.
        direct: Open files with O_DIRECT, one flag per directory.
        verify: Check every read against the checksums of what was written.
        trace: Gets spans of reads and writes.
        new_engine: Makes the engine of `writable` after `suspend`; the same one if None.

    Attributes:
        engine: Moves the bytes.
        verify: Whether every read is checked.
        unsynced: Paths of files that could not be made durable once. They are not linked any more.
        is_suspended: All files are closed; see `suspend`.
        saved: Path of each checkpoint that was saved -> device and inode of its directory.
        is_inherited: This is a forked process: the files are the parent's, and only what it had may be mapped.
    """

    def __init__(
        self,
        directories: list[RunDirectory],
        engine: Engine,
        *,
        direct: list[bool],
        verify: bool,
        trace: Trace | None = None,
        new_engine: Callable[[], Engine] | None = None,
    ) -> None:
        self._directories = directories
        self._direct = direct
        self.engine = engine
        self.verify = verify
        self._trace = trace or Trace()
        self._new_engine = new_engine or (lambda: engine)
        self._lock = threading.RLock()
        self._current: dict[tuple[str, str], Generation] = {}
        self._in_memory: dict[tuple[str, str], tuple[Tensor, ...]] = {}
        self._free: dict[int, list[File]] = defaultdict(list)  # by length
        self._numbers = itertools.count()
        self._staging = Pool(STAGING_NBYTES, "staging")
        self._staging_lock = threading.Lock()  # an update writes states that came late through it too
        self.unsynced: set[str] = set()
        self.saved: dict[str, tuple[int, int]] = {}
        self.is_suspended = False
        self.is_inherited = False
        # Without the native kernel a checksum takes ten times as long as the transfer.
        self._makes_checks = verify or is_native()
        self._maps: weakref.WeakKeyDictionary[mmap.mmap, Generation] = weakref.WeakKeyDictionary()  # by mapping

    @property
    def spill_directory(self) -> str:
        """Where files that are no generations may be made."""
        return self._directories[0].path

    @property
    def scratches(self) -> list[Scratch]:
        """What makes files that are no generations, on each disk."""
        pairs = zip(self._directories, self._direct, strict=True)
        return [Scratch(directory.folder, direct, self.engine.patience) for directory, direct in pairs]

    @property
    def disks(self) -> list[tuple[str, bool]]:
        """Directory of each disk, and whether files in it take O_DIRECT."""
        return [(d.path, direct) for d, direct in zip(self._directories, self._direct, strict=True)]

    # -- generations ---------------------------------------------------------------------------------------------

    def current(self, unit: str, kind: str) -> Generation | None:
        """The newest committed generation, None if there is none.

        Raises:
            StoreError: Its update failed midway; the message is that of the failure.
        """
        generation = self._current.get((unit, kind))
        if generation is not None and generation.damage:
            raise StoreError(generation.damage)
        return generation

    def kinds(self, unit: str) -> list[str]:
        """Kinds of which ``unit`` has a generation."""
        with self._lock:
            return [kind for name, kind in self._current if name == unit]

    def begin(self, layouts: Sequence[UnitLayout]) -> list[Generation]:
        """New generations, one per layout, whose data sections are still to be written; their space is reserved.

        Of a kind that is kept it is the same memory once more, to be changed in place.

        Raises:
            StoreError: The disk is full. None of them is left behind, as after the others.
            IOFailure: The disk failed.
            DeadlineError: The disk did not answer.
        """
        in_memory = [self._in_memory.get((layout.unit, layout.kind)) for layout in layouts]
        new = self._begin_files([layout for layout, tensors in zip(layouts, in_memory, strict=True) if tensors is None])
        made = iter(new)
        return [
            next(made) if tensors is None else Generation(layout, None, tensors)
            for layout, tensors in zip(layouts, in_memory, strict=True)
        ]

    def _begin_files(self, layouts: Sequence[UnitLayout]) -> list[Generation]:
        """The same, of files: made in one call in time, since each waits for another thread."""
        if not layouts:
            return []
        for layout in layouts:
            self._require_own(layout)
        paths = [self._new_path(layout) for layout in layouts]

        def begin() -> list[Generation]:
            with ExitStack() as undo:
                begun = []
                for layout, (disk, path) in zip(layouts, paths, strict=True):
                    file = self._file(path, layout.file_nbytes, disk)
                    begun.append(Generation(layout, file, checks=[None] * -(-layout.data_nbytes // CHECK_NBYTES)))
                    undo.callback(self.abandon, begun[-1])
                    write_all(file, layout.header)
                undo.pop_all()
            return begun

        return self.engine.patience.call(begin, paths[0][1], "making a file")

    def _new_path(self, layout: UnitLayout) -> tuple[int, str]:
        """The disk of a new generation, and its path there."""
        number = next(self._numbers)
        disk = number % len(self._directories)
        slug = re.sub(r"[^A-Za-z0-9._-]", "_", f"{layout.unit[-80:]}.{layout.kind[:80]}")
        return disk, os.path.join(self._directories[disk].path, f"{number:08d}-{slug}.safetensors")

    def commit(self, *generations: Generation) -> None:
        """Make completely written generations the current ones, all or none; those they replace are recycled."""
        with self._lock:
            previous = [self._current.get((g.layout.unit, g.layout.kind)) for g in generations]
            self._current.update({(g.layout.unit, g.layout.kind): g for g in generations})
            for superseded in previous:
                if superseded is not None:
                    self._retire(superseded)
                    superseded.in_memory = None  # those tensors hold other values now

    def abandon(self, generation: Generation, damage: str = "") -> None:
        """Drop a generation that was begun and will not be committed. No transfer on it may be in flight.

        Args:
            generation: What to drop.
            damage: Of one that is kept: why the memory holds neither the old values nor the new ones.
        """
        current = self._current.get((generation.layout.unit, generation.layout.kind))
        if generation.in_memory is not None and current is not None:
            current.damage = damage
        self._retire(generation)

    def forget(self, unit: str, kind: str) -> None:
        """Drop the current generation of a kind, as if it had never been written."""
        with self._lock:
            generation = self._current.pop((unit, kind), None)
        if generation is not None:
            self._retire(generation)

    # -- kept in memory ------------------------------------------------------------------------------------------

    def hold_in_memory(self, layout: UnitLayout, tensors: Sequence[Tensor]) -> None:
        """From now on keep a kind of a unit in ``tensors``, contiguous, one per parameter; [Note: kept].

        They get the values of the current generation; if there is none yet, they are left as they are.
        """
        key = (layout.unit, layout.kind)
        generation = self._current.get(key)
        if generation is not None:
            self._read_into(generation, tensors)
            generation.in_memory = tuple(tensors)
        self._in_memory[key] = tuple(tensors)

    def in_memory(self, unit: str, kind: str) -> tuple[Tensor, ...] | None:
        """Where a kind of a unit is kept, one tensor per parameter; None if it is streamed."""
        return self._in_memory.get((unit, kind))

    def adopt(self, layout: UnitLayout, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """From now on keep what is kept already in ``tensors``; values come with the next `put`. Returns them."""
        self._in_memory[(layout.unit, layout.kind)] = found = tuple(tensors)
        return found

    def on_disk(self, generation: Generation) -> Generation:
        """``generation``, with a file of what is kept in memory."""
        if not generation.has_file:
            in_memory = generation.in_memory
            assert in_memory is not None
            written = self._written(generation.layout, in_memory.__getitem__)
            generation.file, generation.checks = written.file, written.checks
        return generation

    def drop_file(self, generation: Generation) -> None:
        """What is kept of ``generation`` may have been written to: a file of it is not true any more."""
        if generation.in_memory is not None and generation.has_file:
            self._retire(generation)
            generation._file = None

    def flush_in_memory(self) -> None:
        """Write everything that is kept into files, and let go of the memory."""
        for generation in self._current.values():
            if not generation.damage:
                self.on_disk(generation)
            generation.in_memory = None
        self._current = {key: g for key, g in self._current.items() if not g.damage}
        self._in_memory.clear()

    def _read_into(self, generation: Generation, tensors: Sequence[Tensor]) -> None:
        self._require_own(generation.layout)
        with self._staging_lock:
            self._read_staged(generation, tensors)

    def _read_staged(self, generation: Generation, tensors: Sequence[Tensor]) -> None:
        layout, dtype = generation.layout, dtype_of(generation.layout.dtype)
        buffer = self._staging.lend(STAGING_NBYTES, f"staging of {layout.unit}")
        try:
            for begin, end in chunks(layout.numel, STAGING_NBYTES // layout.itemsize):
                staged = buffer.tensor(0, dtype, (end - begin,))
                offset = begin * layout.itemsize
                self.read(generation, offset, buffer.address, staged.nbytes, keep=staged).wait()  # sync: staging
                for segment in layout.segments(begin, end):
                    part = tensors[segment.index].view(-1)[segment.offset : segment.offset + segment.numel]
                    part.copy_(staged[segment.begin - begin : segment.end - begin])
        finally:
            staged = None  # type: ignore[assignment]  # an error keeps this frame, and the buffer is lent again
            self._staging.give_back(buffer)

    # -- bytes ---------------------------------------------------------------------------------------------------

    def read(self, generation: Generation, offset: int, address: int, nbytes: int, *, keep: object = None) -> Transfer:
        """Start reading ``nbytes`` at ``offset`` of the data section; with `verify`, waiting checks them.

        ``offset`` is a multiple of `CHECK_NBYTES`; memory is needed up to the next multiple of 4096.
        """
        where = generation.layout.data_begin + offset
        transfer = self.engine.read(generation.file, where, address, nbytes, keep=keep)
        self._trace.follow(Lane.READ, generation.layout.kind, generation.layout.unit, nbytes, transfer)
        return CheckedRead(transfer, generation, offset, address, nbytes) if self.verify else transfer

    def write(self, generation: Generation, offset: int, address: int, nbytes: int, *, keep: object = None) -> Transfer:
        """Start writing ``nbytes`` at ``offset`` of the data section of a generation that is not committed yet.

        ``offset`` is a multiple of `CHECK_NBYTES`, and so is ``nbytes`` unless it reaches the end.
        """
        if self._makes_checks:
            checks = crc32c_each(address, nbytes, CHECK_NBYTES)
            first = offset // CHECK_NBYTES
            generation.checks[first : first + len(checks)] = checks
        where = generation.layout.data_begin + offset
        transfer = self.engine.write(generation.file, where, address, nbytes, keep=keep)
        self._trace.follow(Lane.WRITE, generation.layout.kind, generation.layout.unit, nbytes, transfer)
        return transfer

    def put(self, layout: UnitLayout, source: Callable[[int], Tensor | None]) -> Generation:
        """Write and commit a generation from tensors, streamed through a small staging buffer.

        Args:
            layout: What to write.
            source: The tensor of each parameter, by index, flat or shaped; converted to the layout's dtype.
                None stands for zeros.
        """
        in_memory = self._in_memory.get((layout.unit, layout.kind))
        if in_memory is None:
            generation = self._written(layout, source)
        else:
            generation = Generation(layout, None, in_memory)
            for index, tensor in enumerate(in_memory):
                found = source(index)
                tensor.zero_() if found is None else tensor.copy_(found.detach().reshape(tensor.shape))
        self.commit(generation)
        return generation

    def _written(self, layout: UnitLayout, source: Callable[[int], Tensor | None]) -> Generation:
        """A file of tensors, not committed."""
        self._require_own(layout)  # before the lock, which a thread may have held at the fork
        with self._staging_lock:
            return self._write_staged(layout, source)

    def _write_staged(self, layout: UnitLayout, source: Callable[[int], Tensor | None]) -> Generation:
        (generation,) = self._begin_files([layout])
        dtype = dtype_of(layout.dtype)
        buffer = self._staging.lend(STAGING_NBYTES, f"staging of {layout.unit}")
        try:
            flats: dict[int, Tensor | None] = {}
            for begin, end in chunks(layout.numel, STAGING_NBYTES // layout.itemsize):
                staged = buffer.tensor(0, dtype, (end - begin,))
                for segment in layout.segments(begin, end):
                    if segment.index not in flats:
                        found = source(segment.index)
                        flats = {segment.index: None if found is None else found.detach().reshape(-1)}
                    flat = flats[segment.index]
                    part = staged[segment.begin - begin : segment.end - begin]
                    if flat is None:
                        part.zero_()
                    else:
                        part.copy_(flat[segment.offset : segment.offset + segment.numel])
                offset = begin * layout.itemsize
                self.write(generation, offset, buffer.address, staged.nbytes, keep=staged).wait()  # sync: staging
                staged = part = None  # type: ignore[assignment]
        except BaseException:
            staged = part = None  # type: ignore[assignment]  # the error keeps this frame, and the buffer is lent again
            self.abandon(generation)
            raise
        finally:
            self._staging.give_back(buffer)
        return generation

    def map(self, generation: Generation, *, private: bool) -> mmap.mmap:
        """Map the whole file, writable; works while files are closed (`suspend`) too.

        Of what is kept it is a copy: what is written to it goes nowhere.

        With ``private`` what is written stays in memory and never reaches the file. A file is not written again as long
        as a mapping of it lives, so a view that the user keeps shows the values it had.

        Raises:
            StoreError: The run is over and its files are gone.
        """
        self.on_disk(generation)
        if not private:
            generation.is_mapped = True
            generation.checks = [None] * len(generation.checks)  # whoever maps it may write
        path = generation.file.path
        with self._telling_missing(generation):
            fd = self._open_to_map(generation.file)
        try:
            memory = map_file(fd, generation.file.nbytes, path, generation.layout.about, private=private)
            self._maps[memory] = generation
        finally:
            close_fd(fd)
        return memory

    def _open_to_map(self, file: File) -> int:
        if self.is_inherited and not file.closed:  # the name may be gone, or another file's
            return os.dup(file.tail_fd)
        return file.open_again(os.O_RDWR)

    def stat(self, generation: Generation) -> os.stat_result:
        """What the file system says of a generation's file; works while files are closed (`suspend`) too.

        Raises:
            StoreError: The run is over and its files are gone, or somebody has removed them.
        """
        with self._telling_missing(generation):
            return generation.file.stat()

    @contextmanager
    def _telling_missing(self, generation: Generation) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise self._missing(generation) from None
        except IOFailure as error:
            if error.errno != errno.ENOENT:
                raise
            raise self._missing(generation) from None

    def _missing(self, generation: Generation) -> StoreError:
        folder = os.path.dirname(generation.file.path)
        if any(directory.is_open and directory.path == folder for directory in self._directories):
            return gone(folder)
        return StoreError(
            f"the {generation.layout.kind} of unit {generation.layout.unit!r} is gone: its run is over and another "
            "one has begun"
        )

    def recycle(self, path: str, folder: Folder | None = None) -> bool:
        """Take a file that nothing else links, such as one of a removed checkpoint, for generations to come.

        Args:
            path: The file.
            folder: The directory it is in, open.

        Returns:
            Whether it is gone from there; False if somebody has it open or mapped, in this process or another (an
            evaluation of the checkpoint, a tensor that the user kept), if it is not a plain file of this user's own, if
            no generation has its size, or if enough such files wait already.
        """
        file = File(path, 0, direct_fd=-1, tail_fd=-1, writable=True, folder=folder)
        found = file.stat()
        alike = sum(g.has_file and g.file.nbytes == found.st_size for g in list(self._current.values()))
        disk = next((i for i, d in enumerate(self._directories) if d.device == found.st_dev), None)
        if self.is_suspended or disk is None or len(self._free[found.st_size]) >= alike:
            return False
        directory = self._directories[disk]
        if not is_own_file(found, directory.folder) or _is_open(file):
            return False
        file.rename(os.path.join(directory.path, f"{next(self._numbers):08d}-recycled.safetensors"), directory.folder)
        # Once more: only now nobody can open it any more, and who did in between must keep its values.
        if _is_open(file):
            file.unlink()
            return True
        file = File.open(file.path, direct=self._direct[disk], writable=True, folder=directory.folder)
        with self._lock:
            self._free[file.nbytes].append(file)
        return True

    # -- room and end --------------------------------------------------------------------------------------------

    def require_free(self, nbytes: int, what: str, *, num_files: int = 0) -> None:
        """Refuse before work starts what cannot fit: so many bytes, in so many new files.

        Raises:
            StoreError: Names what is needed, what is free and the way out.
        """
        shares: dict[int, list[str]] = defaultdict(list)  # directories of each file system
        for directory in self._directories:
            shares[directory.device].append(directory.path)
        for paths in shares.values():
            share = nbytes * len(paths) // len(self._directories)  # generations are spread evenly
            places = ", ".join(repr(os.path.dirname(path)) for path in paths)
            inodes, share_files = free_inodes(paths[0]), -(-num_files * len(paths) // len(self._directories))
            if inodes is not None and inodes < share_files:
                raise StoreError(
                    f"{what} needs {share_files} files on the disk of {places}, whose file system has inodes for "
                    f"{inodes} more; remove files there (not bytes), make the file system with more inodes, choose "
                    "another nvme_path, or cut larger units with units=... or min_unit_numel=..."
                )
            free = free_nbytes(paths[0])
            if free < share:
                raise StoreError(
                    f"{what} needs {fmt(share)} on the disk of {places}, which has {fmt(free)} free; "
                    "free space there or choose another nvme_path"
                )

    def share_on(self, path: str) -> float:
        """The share of the generations that lies on the file system of ``path``, which exists."""
        device = device_of(path)
        return sum(d.device == device for d in self._directories) / len(self._directories)

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes of all current generations and of files waiting to be recycled."""
        with self._lock:
            spare = sum(nbytes * len(files) for nbytes, files in self._free.items())
            return spare + sum(g.file.nbytes for g in self._current.values() if g.has_file)

    def suspend(self) -> None:
        """Close all files without forgetting them; recycled ones are removed. A second call does nothing."""
        self.flush_in_memory()
        with Ending() as ending:
            for generation in self._current.values():
                ending.callback(generation.file.close)
            for file in itertools.chain.from_iterable(self._free.values()):
                ending.callback(file.close)
                ending.callback(partial(_unlink, file))
            self._free.clear()
            self.is_suspended = True

    def resume(self, engine: Engine) -> None:
        """Open the files again after `suspend`."""
        self.engine = engine
        self.is_suspended = False
        for generation in self._current.values():
            path, disk = generation.file.path, self._disk_of(generation.file)
            folder = generation.file.folder
            generation.file = File.open(path, direct=self._direct[disk], writable=True, folder=folder)

    @contextmanager
    def writable(self) -> Iterator[None]:
        """Inside, generations can be written, also after `suspend`: with an engine of its own, and all files open."""
        if not self.is_suspended:
            yield
            return
        self.resume(self._new_engine())
        try:
            yield
        finally:
            self.suspend()
            self.engine.close()

    def close(self, *, remove: bool) -> None:
        """Close all files; with ``remove`` delete the run directories. The engine is not closed."""
        for generation in self._current.values():
            if generation.has_file:
                generation.file.close()
        for files in self._free.values():
            for file in files:
                file.close()
        self._current.clear()
        self._free.clear()
        with Ending() as ending:
            for directory in self._directories:
                ending.callback(partial(directory.close, remove=remove))

    def _file(self, path: str, nbytes: int, disk: int) -> File:
        directory = self._directories[disk].path
        folder = self._directories[disk].folder
        with self._lock:  # not while the disk is asked: it may hang, and others want the lock
            spare = self._free.get(nbytes, [])
            found = next((i for i, file in enumerate(spare) if self._disk_of(file) == disk), None)
            file = None if found is None else spare.pop(found)
        if file is not None:
            try:
                file.rename(path)
            except BaseException:
                file.close()  # nobody has it any more
                raise
            return file
        try:
            return File.create(path, nbytes, direct=self._direct[disk], folder=folder)
        except IOFailure as error:
            raise StoreError(
                f"cannot reserve {fmt(nbytes)} in {directory!r} ({_free_there(directory)}): {error}; "
                "choose another nvme_path; the last checkpoint is whole"
            ) from error

    # -- forked processes ----------------------------------------------------------------------------------------

    def pass_on(self, kind: str) -> None:
        """A process that is about to be forked may read all of ``kind``, and what is mapped, as long as it likes."""
        with self._lock:
            of_kind = [generation for (_, other), generation in self._current.items() if other == kind]
            for generation in (*of_kind, *self._maps.values()):
                generation.is_inherited = True

    def inherit(self, kind: str) -> None:
        """This is a forked process: only generations of ``kind`` are of use, and nothing keeps the run alive."""
        self.is_inherited = True
        if self.is_suspended:
            return
        unused = [g.file for (_, other), g in self._current.items() if other != kind and g.has_file]
        for file in itertools.chain(unused, *self._free.values()):
            file.close()
        self._free.clear()
        for directory in self._directories:
            directory.close(remove=False)

    def _require_own(self, layout: UnitLayout) -> None:
        if self.is_inherited:
            raise ResidencyError(
                f"the {layout.kind} of unit {layout.unit!r} cannot be read or written in a forked process: its files "
                "and memory are those of the process that trains; do it there"
            )

    def _disk_of(self, file: File) -> int:
        folder = os.path.dirname(file.path)
        return next(i for i, directory in enumerate(self._directories) if directory.path == folder)

    def _retire(self, generation: Generation) -> None:
        if not generation.has_file or self.is_inherited:
            return
        file = generation.file
        try:
            with as_io_failure(file.path, what="stat"):
                found = os.fstat(file.tail_fd)
        except IOFailure:
            file.close()  # nobody has it any more
            raise
        if file.hangs:  # what is still in flight would be written over what comes next
            _unlink(file)
            file.close()
            return
        # A tensor on a mapping must keep its values; a private mapping too shows what is written to its file later.
        if found.st_nlink > 1 or generation.is_inherited or generation in self._maps.values():
            _unlink(file)
            file.close()
        else:
            with self._lock:
                self._free[file.nbytes].append(file)


def _unlink(file: File) -> None:
    try:
        file.unlink()
    except IOFailure as error:
        if error.errno != errno.ENOENT:  # else the user removed the run directory, and the space is free already
            raise


def _is_open(file: File) -> bool:
    """Whether anybody, this process included, has the file open or mapped; True where the kernel cannot tell."""
    fd = file.open_again(os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # granted only to the single opener of a file
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return True
    finally:
        close_fd(fd)
    return False


def free_nbytes(path: str) -> int:
    """Bytes that this user may still write to the file system of ``path``."""
    with as_io_failure(path, what="asking for free space"):
        stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def free_inodes(path: str) -> int | None:
    """Files that this user may still make on the file system of ``path``; None where they are not counted."""
    with as_io_failure(path, what="asking for free inodes"):
        stat = os.statvfs(path)
    return stat.f_favail if stat.f_files else None


def _free_there(path: str) -> str:
    try:
        inodes = "no inodes, so no more files, and " if free_inodes(path) == 0 else ""
        return f"{inodes}{fmt(free_nbytes(path))} free"
    except IOFailure as error:
        return str(error)


assert STAGING_NBYTES % CHECK_NBYTES == 0
assert CHECK_NBYTES % BLOCK_NBYTES == 0
