"""The exceptions of the package. Each message names the thing, the numbers, and what to do."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class SSDOffloadError(RuntimeError):
    """Base of all errors raised by lightning_ssd."""


class ConfigurationError(SSDOffloadError, ValueError):
    """A setting that cannot be honoured; the message names the setting and the way out."""


class MemoryPlanError(SSDOffloadError):
    """The memory budget cannot work; the message names the smallest budget that would."""


class StoreError(SSDOffloadError):
    """The run directory cannot be used (locked, no permission, no space)."""


class ResidencyError(SSDOffloadError):
    """A unit cannot be loaded, moved or written in its present state, or outside references hold its memory."""


class RecomputeError(SSDOffloadError):
    """A block's forward was run again in backward and failed, or did not repeat what the first one did."""


class CorruptionError(SSDOffloadError):
    """Bytes read back differ from the bytes written; names unit, file, parameter and offset."""


class CheckpointError(SSDOffloadError):
    """A checkpoint is incomplete, malformed, or does not fit the model."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no checkpoint of that name."""


class OptimizerStateError(CheckpointError, ValueError, KeyError):
    """The optimizer state of a checkpoint does not fit the optimizer.

    Torch raises a ValueError for groups that do not fit, and a KeyError for a value that is not there.
    """

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError shows quotes around it


class TraceError(SSDOffloadError):
    """A trace cannot be written, or what was given as one cannot be read."""


class NonFiniteGradientError(SSDOffloadError):
    """A gradient holds NaN or Inf and nothing (such as a loss scaler) is there to handle it."""


class IOFailure(SSDOffloadError, OSError):
    """A disk operation failed.

    Attributes:
        path: File the operation was on.
        offset: Byte offset in the file.
        nbytes: Bytes asked for.
        errno: The operating system's error number.
    """

    def __init__(self, errno: int, path: str, offset: int, nbytes: int, what: str = "transfer") -> None:
        where = f" of {nbytes} bytes at offset {offset}" if nbytes else ""
        reason = f"{os.strerror(errno)} (errno {errno})"
        message = f"{what}{where} of {path!r} failed: {reason}; {remedy(errno)}"
        super().__init__(message)
        self.errno = errno
        self.path = path
        self.offset = offset
        self.nbytes = nbytes
        self._what = what

    def __reduce__(self) -> tuple[type[IOFailure], tuple[int | None, str, int, int, str]]:
        return type(self), (self.errno, self.path, self.offset, self.nbytes, self._what)

    def __str__(self) -> str:
        return str(self.args[0])


class DeadlineError(IOFailure):
    """A disk operation did not finish in the time allowed; it is still in flight."""


def listed(names: Iterable[str], most: int = 4) -> str:
    """Names for a message: the first ones quoted, and how many more there are; ``none`` if there are none."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return (", ".join(map(repr, every[:most])) or "none") + more


def gone(directory: str) -> StoreError:
    """The error for a run directory that was removed while it is needed."""
    return StoreError(
        f"the run directory {directory!r} is gone: somebody, or a cleaner of temporary files, removed it while it was "
        "in use; the last checkpoint is whole: resume from it, with an nvme_path where nothing is cleaned up"
    )


_NO_ACCESS = "give this user the right to it, or choose another place"
_REMEDIES = {
    errno.EIO: "the disk or its controller fails: see the kernel's log, and resume from the last checkpoint on another "
    "disk",
    errno.ETIMEDOUT: "the disk hangs: see the kernel's log; if it is only slow, raise io.deadline_s",
    errno.ENOSPC: "free space there or choose another place",
    errno.EDQUOT: "free space of this user there or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the system has no more open files: end what holds them, or raise fs.file-max",
    errno.ENOMEM: "free memory, or raise the limit of mappings (sysctl vm.max_map_count)",
    errno.ENOENT: "somebody removed or moved it: leave a run's files alone, and resume from the last checkpoint",
    errno.EACCES: _NO_ACCESS,
    errno.EPERM: _NO_ACCESS,
    errno.EROFS: "the file system is read-only, also if it has made itself so after an error: see the kernel's log",
    errno.ENAMETOOLONG: "choose a shorter path",
}


def remedy(code: int) -> str:
    """What to do about the system's error ``code`` on a file."""
    return _REMEDIES.get(code, "see the kernel's log, or choose another place")


def with_remedy(error: OSError) -> str:
    """The message of the system's error on a file, with what to do about it."""
    return str(error) if isinstance(error, SSDOffloadError) else f"{error}; {remedy(error.errno or 0)}"


class Ending:
    """Callbacks that are called on leaving, the last one first, each even if others fail.

    If several fail, the first error is raised, since it is usually the cause, and one warning tells of the others.
    (`contextlib.ExitStack` raises the last.)
    """

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], object]] = []

    def callback(self, call: Callable[[], object]) -> None:
        """Call it on leaving."""
        self._callbacks.append(call)

    def __enter__(self) -> Ending:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        first = error
        later: list[str] = []
        for call in reversed(self._callbacks):
            try:
                call()
            except BaseException as failure:
                if first is None:
                    first = failure
                elif str(failure) != str(first):
                    later.append(str(failure))
        if later:
            warnings.warn(f"after the first error, {len(later)} more at the end, the last: {later[-1]}", stacklevel=2)
        if first is not None and first is not error:
            raise first


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Add the file name to an `OSError` from a call on a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


@contextmanager
def as_io_failure(path: str, offset: int = 0, nbytes: int = 0, what: str = "transfer") -> Iterator[None]:
    """Turn an `OSError` about a file into an `IOFailure`, which names file, action and remedy."""
    try:
        yield
    except SSDOffloadError:
        raise
    except OSError as error:
        if error.errno == errno.ENOENT and not os.path.isdir(os.path.dirname(path)):
            raise gone(os.path.dirname(path)) from error
        raise IOFailure(error.errno or errno.EIO, path, offset, nbytes, what) from error
