"""What a disk may hold after a power cut: recorded file operations, replayed without the unsynced.

[Note: power cut] The model is POSIX's promise, not the kinder behaviour of one file system. What was written to a file
is on disk for certain only after an fsync of that file; a name that was made, moved or taken away, only after an fsync
of its directory (a move between two directories: of both). Anything else may have reached the disk or not, each
operation by itself and in any order, a write also in part.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = 0
SECTOR_NBYTES = 512


@dataclass(frozen=True)
class Op:
    """One recorded operation on inodes, which are numbered in order of appearance.

    Attributes:
        kind: create, mkdir, link, unlink, rename, exchange, write, size, sync, mark.
        inode: What is named, written or synced.
        at: Directory and name.
        to: Second directory and name, of rename and exchange.
        offset: Of a write; the size, of size.
        data: Of a write, a symlink or a mark.
        other: The inode that an exchange moves the other way.
    """

    kind: str
    inode: int = -1
    at: tuple[int, str] = (-1, "")
    to: tuple[int, str] = (-1, "")
    offset: int = 0
    data: bytes = b""
    other: int = -1

    @property
    def dirs(self) -> frozenset[int]:
        """Directories whose fsync makes it durable; empty for other operations than on names."""
        return frozenset(d for d, _ in (self.at, self.to) if d >= 0)


Piece = tuple[int, int]
"""Number of a write and how many bytes of it are on disk."""


@dataclass
class Disk:
    """Names in directories, and the writes of which each file consists."""

    dirs: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    files: dict[int, tuple[Piece, ...]] = field(default_factory=dict)
    links: dict[int, str] = field(default_factory=dict)

    def apply(self, number: int, op: Op, nbytes: int = -1) -> None:
        """Do an operation, or nothing if what it builds on is not there."""
        if op.kind in ("write", "size"):
            length = len(op.data) if nbytes < 0 else nbytes
            self.files[op.inode] = (*self.files.get(op.inode, ()), (number, length))
            return
        if op.kind in ("sync", "mark"):
            return
        names = self.dirs.setdefault(op.at[0], {})
        if op.kind in ("create", "mkdir", "link", "symlink"):
            if op.at[1] not in names:
                names[op.at[1]] = op.inode
                if op.kind == "mkdir":
                    self.dirs.setdefault(op.inode, {})
                elif op.kind == "symlink":
                    self.links[op.inode] = op.data.decode()
                else:
                    self.files.setdefault(op.inode, ())
            return
        if names.get(op.at[1]) != op.inode:
            return
        if op.kind == "unlink":
            if not self.dirs.get(op.inode):
                del names[op.at[1]]
            return
        others = self.dirs.setdefault(op.to[0], {})
        if op.kind == "exchange":
            if others.get(op.to[1]) == op.other:
                names[op.at[1]], others[op.to[1]] = op.other, op.inode
            return
        assert op.kind == "rename", op.kind
        there = others.get(op.to[1])
        if there is None or not (self.dirs.get(there) or (there in self.dirs) != (op.inode in self.dirs)):
            del names[op.at[1]]
            others[op.to[1]] = op.inode


# ----------------------------------------------------------------------------------------------------------- power cuts


@dataclass(frozen=True)
class Cut:
    """The power fails before operation ``at``; ``kept`` are the operations that reached the disk, with their bytes."""

    at: int
    kept: tuple[tuple[int, int], ...]


def durable(ops: Sequence[Op], at: int) -> set[int]:
    """Numbers of the operations before ``at`` that no power cut can undo; see [Note: power cut]."""
    synced: dict[int, int] = {}
    for number, op in enumerate(ops[:at]):
        if op.kind == "sync":
            synced[op.inode] = number
    found = set()
    for number, op in enumerate(ops[:at]):
        if op.kind in ("write", "size"):
            is_durable = synced.get(op.inode, -1) > number
        else:
            is_durable = all(synced.get(inode, -1) > number for inode in op.dirs)
        if is_durable:
            found.add(number)
    return found


def cuts(ops: Sequence[Op], at: int, rng: random.Random, num_random: int, *, prefixes: bool = True) -> Iterator[Cut]:
    """Nothing, every prefix, all, and random subsets of what is not durable, some with a write in part."""
    certain = durable(ops, at)
    uncertain = [number for number in range(at) if number not in certain]

    def cut(chosen: set[int], torn: bool = False) -> Cut:
        kept = []
        for number in range(at):
            if number in certain or number in chosen:
                length = len(ops[number].data)
                if torn and number in chosen and rng.random() < 0.5:
                    length = rng.randrange(0, length + 1, SECTOR_NBYTES) if length else 0
                kept.append((number, length))
        return Cut(at, tuple(kept))

    lengths = range(len(uncertain) + 1) if prefixes else (0, len(uncertain))
    for length in lengths:
        yield cut(set(uncertain[:length]))
    for _ in range(num_random if uncertain else 0):
        share = rng.random()
        yield cut({number for number in uncertain if rng.random() < share}, torn=True)
    if prefixes:
        for number in uncertain:  # one that overtakes all others, and one that is overtaken by all others
            yield cut({number})
            yield cut(set(uncertain) - {number})


def after(ops: Sequence[Op], cut: Cut) -> Disk:
    """What is on the disk when the power is back."""
    disk = Disk()
    for number, nbytes in cut.kept:
        disk.apply(number, ops[number], nbytes)
    return disk


Tree = dict[str, bytes | str | None]
"""Path below the root -> content of a file, target of a symlink, None for a directory."""


def tree(disk: Disk, ops: Sequence[Op]) -> Tree:
    """The names that lead somewhere from the root."""
    found: Tree = {}

    def walk(inode: int, path: str) -> None:
        for name, child in sorted(disk.dirs[inode].items()):
            if child in disk.dirs:
                found[path + name] = None
                walk(child, f"{path}{name}/")
            elif child in disk.links:
                found[path + name] = disk.links[child]
            else:
                found[path + name] = _content(disk.files.get(child, ()), ops)

    walk(ROOT, "")
    return found


def write_tree(found: Tree, to: Path) -> None:
    """Make a tree, under a directory that exists."""
    for path, content in found.items():
        if content is None:
            (to / path).mkdir()
        elif isinstance(content, str):
            (to / path).symlink_to(content)
        else:
            (to / path).write_bytes(content)


def _content(pieces: tuple[Piece, ...], ops: Sequence[Op]) -> bytes:
    content = bytearray()
    for number, nbytes in pieces:
        op = ops[number]
        if op.kind == "size":
            content = content[: op.offset].ljust(op.offset, b"\0")
        elif nbytes:
            content = content.ljust(op.offset, b"\0")
            content[op.offset : op.offset + nbytes] = op.data[:nbytes]
    return bytes(content)
