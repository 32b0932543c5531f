"""Which engine runs here, and whether a directory takes O_DIRECT: found by trying, said in one sentence."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import warnings

from lightning_ssd.errors import ConfigurationError, as_io_failure
from lightning_ssd.io.engine import Engine, File, IOOptions, validate
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
    """Whether the native module is there; importing `_extension` says so, once, if it is not."""
    from lightning_ssd import _extension

    return _extension._native is not None


def _without_native(options: IOOptions) -> Engine:
    missing = "the native module was not built"
    if options.engine != "auto":
        way_out = "install with a C++20 compiler, or use engine='auto'"
        raise ConfigurationError(f"io option engine={options.engine!r}, but {missing}; {way_out}")
    return PythonEngine(options, reason=f"python: {missing}, so transfers cost CPU time under the interpreter lock")


def use_direct(options: IOOptions, directory: str | os.PathLike[str]) -> bool:
    """Whether files in ``directory`` are to be opened with O_DIRECT, after trying it there.

    Raises:
        ConfigurationError: ``direct="on"`` and the file system refuses it.
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
    # Some file systems (FUSE, overlays) accept the open and refuse the transfer, so a block is really written.
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
