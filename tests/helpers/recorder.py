"""The file operations of this process, recorded as they happen, for `tests.helpers.power_cut` to replay.

The recorder knows every function of ``os`` that changes files. One that it does not know, a file opened for writing by
other means, or a foreign function of the C library is an error while it records; and at the end the recorded
operations must add up to what the directory holds.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_ssd.checkpoint import directory as directory_module
from tests.helpers.power_cut import ROOT, Disk, Op, Tree, tree

READING = frozenset(
    (
        "_exit", "abort", "access", "close", "cpu_count", "dup", "fspath", "fstat", "fstatvfs", "get_blocking",
        "get_inheritable", "getcwd", "getegid", "geteuid", "getgid", "getloadavg", "getpid", "getppid", "getuid",
        "isatty", "listdir", "lseek", "lstat", "posix_fadvise", "pread", "preadv", "read", "readlink", "scandir",
        "sched_getaffinity", "sched_yield", "stat", "statvfs", "strerror", "sysconf", "times", "uname", "urandom",
    )
)  # fmt: skip
"""Built-in functions of ``os`` that change no file."""

KNOWN_C = frozenset(("renameat2", "madvise", "posix_fadvise"))
"""Functions of the C library that the package calls by ctypes; renameat2 is recorded where it is called."""


class Died(BaseException):
    """The process was killed here; nothing it would do afterwards happens."""


class UnknownOperation(AssertionError):
    """A file was changed in a way that the recorder does not know."""


class Recorder:
    """The operations of this process below ``root``, while `recording`.

    Attributes:
        ops: What happened, in order.
        now: The disk if nothing were lost.
    """

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self.ops: list[Op] = []
        self.now = Disk()
        self.die_at: int | None = None
        self._num_inodes = 1
        self._inodes: dict[tuple[int, int], int] = {self._identity(os.stat(self.root)): ROOT}
        self._lock = threading.RLock()
        self._in_handler = threading.local()
        self._real: dict[str, Callable[..., Any]] = {}
        self._dead = False

    @contextmanager
    def recording(self, *, can_exchange: bool = True) -> Iterator[Recorder]:
        """Watch; what is below ``root`` already counts as durable."""
        if not self.ops:
            self._take_stock(self.root, ROOT)
        with pytest.MonkeyPatch.context() as patch:
            for name, function in list(vars(os).items()):
                if isinstance(function, types.BuiltinFunctionType) and name not in READING:
                    self._real[name] = function
                    patch.setattr(os, name, self._wrapped(name, function))
            exchange = directory_module._exchange if can_exchange else lambda first, second: False
            patch.setattr(directory_module, "_exchange", self._wrapped_exchange(exchange))
            _ACTIVE.append(self)
            try:
                yield self
            finally:
                _ACTIVE.remove(self)

    def mark(self, text: str) -> None:
        """Note that something begins or is done."""
        self._add(Op("mark", data=text.encode()))

    @contextmanager
    def dying_at(self, number: int) -> Iterator[None]:
        """The process is killed before operation ``number``; another one goes on after the block."""
        self.die_at = number
        try:
            yield
        except Died:
            pass
        finally:
            self.die_at, self._dead = None, False

    def check(self) -> None:
        """The recorded operations must make what there is: else one of them went by unseen."""
        found = _tree_on_disk(self.root)
        recorded = {path: content for path, content in tree(self.now, self.ops).items() if not path.startswith("live")}
        found = {path: content for path, content in found.items() if not path.startswith("live")}
        assert recorded == found, f"recorded {sorted(recorded)}, found {sorted(found)}, or contents differ"

    # ----------------------------------------------------------------------------------------- from calls to operations

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        handler = getattr(self, f"_on_{name}", None)

        def run(*args: Any, **kwargs: Any) -> Any:
            if _ACTIVE[-1:] != [self]:
                return function(*args, **kwargs)
            if handler is None:
                raise UnknownOperation(f"os.{name}{args!r} is unknown to tests/helpers/recorder.py: teach it")
            with self._lock, self._handling():
                return handler(*args, **kwargs)

        return run

    def _wrapped_exchange(self, function: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
        def run(first: str, second: str) -> bool:
            with self._lock, self._handling():
                a, b = self._place(first), self._place(second)
                self._die_if_due()
                done = function(first, second)
                if done:
                    self._add(Op("exchange", self._named(a), a, b, other=self._named(b)))
                return done

        return run

    @contextmanager
    def _handling(self) -> Iterator[None]:
        self._in_handler.depth = getattr(self._in_handler, "depth", 0) + 1
        try:
            yield
        finally:
            self._in_handler.depth -= 1

    def is_unseen(self) -> bool:
        """Whether no handler of ours is under way in this thread."""
        return getattr(self._in_handler, "depth", 0) == 0

    def _on_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd) if flags & (os.O_CREAT | os.O_TRUNC) else None
        if place is not None:
            self._die_if_due()
            if self._dead:
                raise Died
        before = None if place is None else self._named_or_none(place)
        if flags & getattr(os, "O_TMPFILE", 0) == os.O_TMPFILE:
            raise UnknownOperation("O_TMPFILE")
        fd: int = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        if place is not None:
            found = os.fstat(fd)
            if before is None and flags & os.O_CREAT:
                self._inodes[self._identity(found)] = self._num_inodes
                self._add(Op("create", self._new_inode(), place))
            elif flags & os.O_TRUNC:
                self._add(Op("size", self._inodes[self._identity(found)], offset=0))
        return fd

    def _on_mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if dir_fd is None and os.path.lexists(path):
            raise FileExistsError(path)
        place = self._place(path, dir_fd)
        self._die_if_due()
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        self._inodes[self._identity(os.stat(path, dir_fd=dir_fd))] = self._num_inodes
        self._add(Op("mkdir", self._new_inode(), place))

    def _on_link(self, src: Any, dst: Any, *, src_dir_fd: Any = None, dst_dir_fd: Any = None, **kwargs: Any) -> None:
        source, place = self._place(src, src_dir_fd), self._place(dst, dst_dir_fd)
        self._die_if_due()
        self._real["link"](src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **kwargs)
        self._add(Op("link", self._named(source), place))

    def _on_symlink(self, src: Any, dst: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> None:
        place = self._place(dst, dir_fd)
        self._die_if_due()
        self._real["symlink"](src, dst, *args, dir_fd=dir_fd, **kwargs)
        self._add(Op("symlink", self._new_inode(), place, data=os.fsencode(src)))

    def _on_rename(self, src: Any, dst: Any, *, src_dir_fd: Any = None, dst_dir_fd: Any = None) -> None:
        source, place = self._place(src, src_dir_fd), self._place(dst, dst_dir_fd)
        self._die_if_due()
        inode = self._named(source)
        self._real["rename"](src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        self._add(Op("rename", inode, source, place))

    _on_replace = _on_rename

    def _on_unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._take_name("unlink", path, dir_fd)

    def _on_remove(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._take_name("unlink", path, dir_fd)

    def _on_rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._take_name("rmdir", path, dir_fd)

    def _take_name(self, call: str, path: Any, dir_fd: int | None) -> None:
        place = self._place(path, dir_fd)
        self._die_if_due()
        inode = self._named_or_none(place)
        self._real[call](path, dir_fd=dir_fd)
        assert inode is not None
        self._add(Op("unlink", inode, place))

    def _on_write(self, fd: int, data: Any) -> int:
        inode = self._inode_of(fd)
        if inode is None:
            written: int = self._real["write"](fd, data)
            return written
        self._die_if_due()
        offset = os.lseek(fd, 0, os.SEEK_CUR)
        written = self._real["write"](fd, data)
        self._add_write(Op("write", inode, offset=offset, data=bytes(data)[:written]))
        return written

    def _on_pwrite(self, fd: int, data: Any, offset: int) -> int:
        inode = self._inode_of(fd)
        self._die_if_due()
        written: int = self._real["pwrite"](fd, data, offset)
        if inode is not None:
            self._add(Op("write", inode, offset=offset, data=bytes(data)[:written]))
        return written

    def _on_ftruncate(self, fd: int, length: int) -> None:
        self._die_if_due()
        self._real["ftruncate"](fd, length)
        inode = self._inode_of(fd)
        if inode is not None:
            self._add(Op("size", inode, offset=length))

    def _on_posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        self._die_if_due()
        before = os.fstat(fd).st_size
        self._real["posix_fallocate"](fd, offset, length)
        inode = self._inode_of(fd)
        if inode is not None and offset + length > before:
            self._add(Op("size", inode, offset=offset + length))

    def _on_fsync(self, fd: int) -> None:
        self._sync("fsync", fd)

    def _on_fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd)

    def _sync(self, call: str, fd: int) -> None:
        self._die_if_due()
        # Not done for real: nothing here outlives the machine, and the disk would take most of the time.
        inode = self._inode_of(fd)
        if inode is None:
            self._real[call](fd)
        else:
            self._add(Op("sync", inode))

    # Without effect on names or contents that a power cut could take away.
    def _on_set_inheritable(self, fd: int, inheritable: bool) -> None:
        self._real["set_inheritable"](fd, inheritable)

    def _on_umask(self, mask: int) -> int:
        found: int = self._real["umask"](mask)
        return found

    # ---------------------------------------------------------------------------------------------------------- places

    def _add(self, op: Op) -> None:
        with self._lock:
            self.now.apply(len(self.ops), op)
            self.ops.append(op)

    def _add_write(self, op: Op) -> None:
        """A write that goes on where the last one ended is one with it; a power cut may tear it anywhere."""
        last = self.ops[-1] if self.ops else op
        if last.kind == "write" and last.inode == op.inode and last.offset + len(last.data) == op.offset:
            merged = self.ops[-1] = replace(last, data=last.data + op.data)
            pieces = self.now.files[op.inode]
            self.now.files[op.inode] = (*pieces[:-1], (len(self.ops) - 1, len(merged.data)))
        else:
            self._add(op)

    def _die_if_due(self) -> None:
        if self._dead or (self.die_at is not None and len(self.ops) >= self.die_at):
            self._dead = True
            raise Died

    def _new_inode(self) -> int:
        self._num_inodes += 1
        return self._num_inodes - 1

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[int, str]:
        """Directory and name of a path, which must be below the root."""
        text = os.fsdecode(path)
        if dir_fd is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        folder, name = os.path.split(os.path.abspath(text))
        folder = os.path.realpath(folder)
        if folder != self.root and not folder.startswith(self.root + "/"):
            raise UnknownOperation(f"{text!r} is changed, which is outside {self.root!r}")
        return self._inodes[self._identity(os.stat(folder))], name

    def _named(self, place: tuple[int, str]) -> int:
        return self.now.dirs[place[0]][place[1]]

    def _named_or_none(self, place: tuple[int, str]) -> int | None:
        return self.now.dirs[place[0]].get(place[1])

    def _inode_of(self, fd: int) -> int | None:
        """The inode behind a descriptor, if it is one of ours."""
        found = os.fstat(fd)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return None
        return self._inodes.get(self._identity(found))

    @staticmethod
    def _identity(found: os.stat_result) -> tuple[int, int]:
        return found.st_dev, found.st_ino

    def _take_stock(self, folder: str, inode: int) -> None:
        """Record what is there before, as durable."""
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                found = entry.stat(follow_symlinks=False)
                known = self._inodes.get(self._identity(found))
                if entry.is_dir(follow_symlinks=False):
                    child = self._inodes[self._identity(found)] = self._new_inode()
                    self._add(Op("mkdir", child, (inode, entry.name)))
                    self._take_stock(entry.path, child)
                elif known is not None:
                    self._add(Op("link", known, (inode, entry.name)))
                else:
                    child = self._inodes[self._identity(found)] = self._new_inode()
                    self._add(Op("create", child, (inode, entry.name)))
                    self._add(Op("write", child, data=Path(entry.path).read_bytes()))
                    self._add(Op("sync", child))
        self._add(Op("sync", inode))


_ACTIVE: list[Recorder] = []
_CHANGING_EVENTS = frozenset(
    ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate", "mmap.__new__")
)


def _on_audit_event(event: str, args: tuple[Any, ...]) -> None:
    """Python tells of every file that it opens or changes, whoever asks; stays installed, and asleep."""
    if not _ACTIVE or not _ACTIVE[-1].is_unseen():
        return
    root = _ACTIVE[-1].root
    if event == "open" and isinstance(args[0], str | bytes):
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and os.fsdecode(args[0]).startswith(root):
            raise UnknownOperation(f"{args[0]!r} is opened for writing past the recorder")
    elif event in _CHANGING_EVENTS:
        raise UnknownOperation(f"{event} of {args!r} goes past the recorder")
    elif event == "ctypes.dlsym" and isinstance(args[1], str) and args[1] not in KNOWN_C:
        raise UnknownOperation(f"{args[1]} of the C library is unknown to tests/helpers/recorder.py")
    elif event == "ctypes.dlsym" and args[1] == "renameat2":
        raise UnknownOperation("renameat2 is called elsewhere than where it is recorded")


sys.addaudithook(_on_audit_event)


def _tree_on_disk(root: str) -> Tree:
    found: Tree = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            key = os.path.relpath(path, root)
            if os.path.islink(path):
                found[key] = os.readlink(path)
            else:
                found[key] = None if name in folders else Path(path).read_bytes()
    return dict(sorted(found.items()))
