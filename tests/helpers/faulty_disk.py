"""A file system that fails on demand, below a real one: FUSE, spoken with the kernel directly, over a directory.

It runs in a process of its own (``python -m tests.helpers.faulty_disk MOUNT SOURCE``), takes rules as JSON lines on
standard input and answers each with what the rules before it hit. For root, on Linux with ``/dev/fuse``.
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_IN = struct.Struct("<IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, padding
_OUT = struct.Struct("<IiQ")  # length, error, unique
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ROOT = 1
_MAX_WRITE = 1 << 20
REPOSITORY = Path(__file__).resolve().parents[2]

# Opcodes of the FUSE protocol (linux/fuse.h).
LOOKUP, FORGET, GETATTR, SETATTR, MKDIR, UNLINK, RMDIR, RENAME, LINK = 1, 2, 3, 4, 9, 10, 11, 12, 13
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR = (
    14, 15, 16, 17, 18, 20, 25, 26, 27, 28, 29, 30,
)  # fmt: skip
CREATE, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE, RENAME2 = 35, 36, 38, 42, 43, 45
NAMES = {
    "read": (READ,),
    "write": (WRITE,),
    "fsync": (FSYNC, FSYNCDIR),
    "rename": (RENAME, RENAME2),
    "create": (CREATE, FALLOCATE),
    "link": (LINK,),
    "open": (OPEN,),
    "unlink": (UNLINK,),
    "mkdir": (MKDIR,),
}


@dataclass(frozen=True)
class DiskRule:
    """What goes wrong with operations that match.

    Attributes:
        operation: A key of `NAMES`.
        path: Pattern of the file's path below the mount, as in `fnmatch`.
        fault: An errno by name, "short" (half of the bytes), "flip" (a bit), or "hang" (no answer until the caller is
            killed or the rules are cleared).
        nth: Only the nth match, from 0; None for all.
    """

    operation: str
    path: str
    fault: str
    nth: int | None = None


class Disk:
    """A mounted faulty disk, seen from the test."""

    def __init__(self, mount: Path, process: subprocess.Popen[str]) -> None:
        self.path = mount
        self._process = process

    def set_rules(self, *rules: DiskRule) -> int:
        """These and no others, from now on; what hangs goes on. Returns how often the rules before were hit."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([asdict(rule) for rule in rules]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def faulty_disk(folder: Path) -> Iterator[Disk]:
    """A disk without rules, mounted in ``folder``."""
    mount, source = folder / "mount", folder / "below"
    mount.mkdir()
    source.mkdir()
    command = [sys.executable, "-m", "tests.helpers.faulty_disk", str(mount), str(source)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Disk(mount, process)
    finally:
        _LIBC.umount2(os.fsencode(mount), 2)  # detached: what is open may stay so
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


# ---------------------------------------------------------------------------------------------------- the other process


class _Node:
    def __init__(self, path: str) -> None:
        self.path = path


class _Server:
    """Answers the kernel: each request in a thread of its own, so that one that hangs holds up no other."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._nodes: dict[int, _Node] = {_ROOT: _Node("")}
        self._numbers: dict[tuple[int, int], int] = {}  # node numbers, by device and inode
        self._rules: list[DiskRule] = []
        self._counts: list[int] = []
        self._hits = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._era = 0
        self._interrupted: set[int] = set()
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)

    def mount(self, where: str) -> None:
        options = (
            f"fd={self.fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={_MAX_WRITE}"
        )
        if _LIBC.mount(b"faulty", os.fsencode(where), b"fuse", 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), "mount of a FUSE file system")

    def set_rules(self, rules: list[DiskRule]) -> int:
        with self._changed:
            hits, self._hits = self._hits, 0
            self._rules, self._counts = rules, [0] * len(rules)
            self._era += 1
            self._changed.notify_all()
        return hits

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self.fd, _MAX_WRITE + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                raise
            _, opcode, unique, node, *_ = _IN.unpack_from(request)
            body = request[_IN.size :]
            if opcode in (FORGET, BATCH_FORGET):
                continue  # nodes are few, and live as long as the disk
            if opcode == INTERRUPT:
                with self._changed:
                    self._interrupted.add(struct.unpack_from("<Q", body)[0])
                    self._changed.notify_all()
                continue
            if opcode == DESTROY:
                return
            threading.Thread(target=self._answer, args=(opcode, unique, node, body), daemon=True).start()

    def _answer(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        error, data = 0, b""
        try:
            fault = self._fault(opcode, node, body)
            if fault == "hang":
                self._hang(unique)
                fault = ""
            if fault not in ("", "short", "flip"):
                raise OSError(getattr(errno, fault), fault)
            data = self._do(opcode, node, body, fault)
        except OSError as failure:
            error = failure.errno or errno.EIO
        with suppress(FileNotFoundError, OSError):  # the caller is gone, or the mount
            os.write(self.fd, _OUT.pack(_OUT.size + len(data), -error, unique) + data)

    def _hang(self, unique: int) -> None:
        with self._changed:
            era = self._era
            self._changed.wait_for(lambda: self._era != era or unique in self._interrupted)
            if unique in self._interrupted:
                raise OSError(errno.EINTR, "interrupted")

    def _fault(self, opcode: int, node: int, body: bytes) -> str:
        path = self._nodes[node].path if node in self._nodes else ""
        if opcode in (CREATE, RENAME, RENAME2, LINK, UNLINK, MKDIR):
            path = os.path.join(path, os.fsdecode(_name(opcode, body)))
        with self._lock:
            for i, rule in enumerate(self._rules):
                if opcode in NAMES[rule.operation] and fnmatch.fnmatch(path, rule.path):
                    self._counts[i] += 1
                    if rule.nth in (None, self._counts[i] - 1):
                        self._hits += 1
                        return rule.fault
        return ""

    # -- operations ----------------------------------------------------------------------------------------------

    def _do(self, opcode: int, node: int, body: bytes, fault: str) -> bytes:
        if opcode == INIT:
            _, _, readahead, flags = struct.unpack_from("<IIII", body)
            wanted = flags & (
                1 << 0 | 1 << 5 | 1 << 15 | 1 << 22
            )  # asynchronous reads, large writes, direct I/O, many pages
            return struct.pack("<IIIIHHIIHHI7I", 7, 31, readahead, wanted, 16, 12, _MAX_WRITE, 1, 256, 0, 0, *[0] * 7)
        if opcode == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + _attr(os.stat(self._open_path(node)))
        if opcode == STATFS:
            v = os.statvfs(self._source)
            return struct.pack("<QQQQQIIII6I", v.f_blocks, v.f_bfree, v.f_bavail, v.f_files, v.f_ffree, v.f_bsize, 255,
                               v.f_frsize, 0, *[0] * 6)  # fmt: skip
        if opcode in (FLUSH, RELEASE, RELEASEDIR):
            if opcode != FLUSH:
                os.close(struct.unpack_from("<Q", body)[0])
            return b""
        if opcode in (FSYNC, FSYNCDIR):
            os.fsync(struct.unpack_from("<Q", body)[0])
            return b""
        if opcode in (OPEN, OPENDIR):
            flags = struct.unpack_from("<I", body)[0]
            mode = os.O_RDONLY if opcode == OPENDIR else flags & os.O_ACCMODE
            return struct.pack("<QII", os.open(self._open_path(node), mode), 0, 0)
        if opcode == READDIR:
            return self._entries(body)
        if opcode == READ:
            fd, offset, nbytes = struct.unpack_from("<QQI", body)
            return _flipped(os.pread(fd, nbytes, offset), fault)
        if opcode == WRITE:
            fd, offset, nbytes, _, _, _, _ = struct.unpack_from("<QQIIQII", body)
            data = _flipped(body[40 : 40 + nbytes], fault)
            return struct.pack("<II", os.pwrite(fd, data, offset), 0)
        if opcode == FALLOCATE:
            fd, offset, nbytes, mode, _ = struct.unpack_from("<QQQII", body)
            if mode:
                raise OSError(errno.EOPNOTSUPP, "fallocate")
            os.posix_fallocate(fd, offset, nbytes)
            return b""
        return self._change(opcode, node, body)

    def _change(self, opcode: int, node: int, body: bytes) -> bytes:
        folder = self._path(node)
        if opcode == SETATTR:
            return self._set_attr(node, body)
        if opcode in (RENAME, RENAME2):
            skip = 8 if opcode == RENAME else 16
            old, new = body[skip:].split(b"\0")[:2]
            target = struct.unpack_from("<Q", body)[0]
            flags = struct.unpack_from("<I", body, 8)[0] if opcode == RENAME2 else 0
            self._rename(
                os.path.join(folder, os.fsdecode(old)), os.path.join(self._path(target), os.fsdecode(new)), flags
            )
            return b""
        name = os.fsdecode(_name(opcode, body))
        path = os.path.join(folder, name)
        if opcode == LOOKUP:
            return self._entry(path)
        if opcode == MKDIR:
            os.mkdir(path, struct.unpack_from("<I", body)[0] & 0o7777)
            return self._entry(path)
        if opcode == UNLINK:
            os.unlink(path)
            return b""
        if opcode == RMDIR:
            os.rmdir(path)
            return b""
        if opcode == LINK:
            # With a descriptor Python calls what follows the link that /proc shows.
            os.link(self._open_path(struct.unpack_from("<Q", body)[0]), path, src_dir_fd=self.fd, follow_symlinks=True)
            return self._entry(path)
        if opcode == CREATE:
            flags, mode = struct.unpack_from("<II", body)
            keep = os.O_ACCMODE | os.O_EXCL | os.O_TRUNC
            fd = os.open(path, flags & keep | os.O_CREAT, mode & 0o7777)
            return self._entry(path) + struct.pack("<QII", fd, 0, 0)
        raise OSError(errno.ENOSYS, f"opcode {opcode}")

    def _rename(self, old: str, new: str, flags: int) -> None:
        if _LIBC.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), ctypes.c_uint(flags)) != 0:
            raise OSError(ctypes.get_errno(), "rename")
        with self._lock:
            inside = os.path.relpath(old, self._source), os.path.relpath(new, self._source)
            for node in self._nodes.values():
                for a, b in (inside, inside[::-1]) if flags & 2 else (inside,):
                    if node.path == a or node.path.startswith(a + "/"):
                        node.path = b + node.path[len(a) :]
                        break

    def _set_attr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, *_ = struct.unpack_from(
            "<IIQQQQQQIIIIIII", body
        )
        path = self._open_path(node)
        if valid & 1:
            os.chmod(path, mode & 0o7777)
        if valid & 8:
            os.truncate(path, size)
        if valid & (16 | 32):
            found, now = os.stat(path), time.time_ns()
            times = [found.st_atime_ns, found.st_mtime_ns]
            if valid & 16:
                times[0] = now if valid & 128 else atime * 10**9 + atime_ns
            if valid & 32:
                times[1] = now if valid & 256 else mtime * 10**9 + mtime_ns
            os.utime(path, ns=(times[0], times[1]))
        return struct.pack("<QII", 0, 0, 0) + _attr(os.stat(path))

    def _entries(self, body: bytes) -> bytes:
        fd, offset, nbytes = struct.unpack_from("<QQI", body)
        found = [".", "..", *sorted(os.listdir(fd))][offset:]
        out = b""
        for i, name in enumerate(found, start=offset + 1):
            raw = os.fsencode(name)
            entry = struct.pack("<QQII", i, i, len(raw), 0) + raw
            entry += b"\0" * (-len(entry) % 8)
            if len(out) + len(entry) > nbytes:
                break
            out += entry
        return out

    def _entry(self, path: str) -> bytes:
        found = os.lstat(path)
        key = found.st_dev, found.st_ino
        with self._lock:
            number = self._numbers.get(key)
            inside = os.path.relpath(path, self._source)
            if number is None:
                # Held open, so that a file without a name can still be reached, and its inode number is not used again.
                number = os.open(path, os.O_PATH | os.O_NOFOLLOW) + 10
                self._numbers[key] = number
                self._nodes[number] = _Node(inside)
            elif not os.path.lexists(os.path.join(self._source, self._nodes[number].path)):
                self._nodes[number].path = inside
        return struct.pack("<QQQQII", number, 0, 0, 0, 0, 0) + _attr(found)

    def _path(self, node: int) -> str:
        if node != _ROOT and not os.path.lexists(os.path.join(self._source, self._nodes[node].path)):
            return self._open_path(node)
        return os.path.join(self._source, self._nodes[node].path)

    def _open_path(self, node: int) -> str:
        return self._source if node == _ROOT else f"/proc/self/fd/{node - 10}"


def _name(opcode: int, body: bytes) -> bytes:
    skip = {LOOKUP: 0, UNLINK: 0, RMDIR: 0, MKDIR: 8, LINK: 8, CREATE: 16, RENAME: 8, RENAME2: 16}.get(opcode)
    if skip is None:
        raise OSError(errno.ENOSYS, f"opcode {opcode}")
    return body[skip:].split(b"\0")[0]


def _flipped(data: bytes, fault: str) -> bytes:
    if fault == "short":
        return data[: max(len(data) // 2 // 4096 * 4096, 1)]
    if fault == "flip" and data:
        at = min(len(data) - 1, 77)
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
    return data


def _attr(found: os.stat_result) -> bytes:
    times = [found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns]
    seconds, rest = [t // 10**9 for t in times], [t % 10**9 for t in times]
    return _ATTR.pack(
        found.st_ino, found.st_size, found.st_blocks, *seconds, *rest, found.st_mode, found.st_nlink, found.st_uid,
        found.st_gid, found.st_rdev, 4096, 0,
    )  # fmt: skip


def main(mount: str, source: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = _Server(source)
    server.mount(mount)
    threading.Thread(target=server.serve, daemon=True).start()
    assert stat.S_ISDIR(os.stat(mount).st_mode)
    print("ready", flush=True)
    for line in sys.stdin:
        print(server.set_rules([DiskRule(**rule) for rule in json.loads(line)]), flush=True)
    os._exit(0)  # threads that hang


if __name__ == "__main__":
    main(*sys.argv[1:])
