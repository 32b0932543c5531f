"""Which engine works on this machine, and whether a directory supports O_DIRECT: found out by trying."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import warnings

from lightning_ssd.errors import ConfigurationError, as_io_failure
from lightning_ssd.io.engine import Engine, IOOptions, validate
from lightning_ssd.io.file import File
from lightning_ssd.io.native_engines import make_posix_engine, make_uring_engine
from lightning_ssd.io.python_engine import PythonEngine
from lightning_ssd.sizes import BLOCK_NBYTES


def make_engine(options: IOOptions) -> Engine:
    """The engine that ``options`` asks for; with ``engine="auto"`` the fastest that works on this machine.

    Raises:
        ConfigurationError: An option is invalid, or the engine asked for by name does not work here.
    """
    validate(options)
    if options.engine == "python":
        return PythonEngine(options, reason="python: asked for by io option engine='python'")
    if not native_is_built():
        return _without_native(options)
    if options.engine == "posix":
        return make_posix_engine(options, reason="posix: asked for by io option engine='posix'")
    try:
        return make_uring_engine(options, reason="uring: io_uring works here and costs the least CPU time per transfer")
    except OSError as error:
        refusal = f"io_uring is refused here ({error})"
        if options.engine == "uring":
            raise ConfigurationError(f"io option engine='uring', but {refusal}; use engine='auto'") from error
        return make_posix_engine(options, reason=f"posix: {refusal}")


def native_is_built() -> bool:
    """Whether the native module can be imported; the first import of `_extension` warns if it cannot."""
    from lightning_ssd import _extension

    return _extension._native is not None


def _without_native(options: IOOptions) -> Engine:
    missing = "the native module was not built"
    if options.engine != "auto":
        way_out = "install with a C++20 compiler, or use engine='auto'"
        raise ConfigurationError(f"io option engine={options.engine!r}, but {missing}; {way_out}")
    return PythonEngine(options, reason=f"python: {missing}, so transfers cost CPU time under the interpreter lock")


def use_direct(options: IOOptions, directory: str | os.PathLike[str]) -> bool:
    """Whether to open files in ``directory`` with O_DIRECT; warns if the file system refuses it.

    Raises:
        ConfigurationError: ``direct="on"`` and the file system refuses it.
        IOFailure: The disk failed.
    """
    if options.direct == "off":
        return False
    if _takes_direct(directory):
        return True
    refusal = f"the file system of {os.fspath(directory)!r} refuses O_DIRECT"
    if options.direct == "on":
        raise ConfigurationError(f"io option direct='on', but {refusal}; use direct='auto' or another directory")
    warnings.warn(
        f"lightning_ssd: {refusal}; transfers go through the page cache, 3 to 5 times slower on an NVMe disk",
        stacklevel=2,
    )
    return False


def _takes_direct(directory: str | os.PathLike[str]) -> bool:
    """Whether a block can be written there with O_DIRECT; some file systems (FUSE, overlays) refuse only the write."""
    path = os.path.join(os.fspath(directory), ".direct-probe")
    with (
        as_io_failure(path, what="trying O_DIRECT"),
        tempfile.TemporaryDirectory(prefix=".direct-probe-", dir=directory) as inside,
    ):
        file = File.create(os.path.join(inside, "probe"), BLOCK_NBYTES, direct=True)
        try:
            with mmap.mmap(-1, BLOCK_NBYTES) as block:
                return file.is_direct and os.pwritev(file.direct_fd, [block], 0) == BLOCK_NBYTES
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        finally:
            file.close()
