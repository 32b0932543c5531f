"""Opens the store of a run on its disks, and removes it at the end."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Sequence
from functools import partial

from lightning_ssd.errors import Ending, IOFailure
from lightning_ssd.io.engine import Engine, IOOptions
from lightning_ssd.io.select import use_direct
from lightning_ssd.store.run_directory import RunDirectory, warn_of_dead_runs
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.trace.recorder import Trace


def open_store(
    roots: Sequence[str], options: IOOptions, engine: Engine, *, keep: bool, verify: bool, trace: Trace
) -> StateStore:
    """A new store with a run directory on each disk; raises the process's limit of open files to its hard limit.

    Args:
        roots: Directories in which to make the run directories, one per disk.
        options: Of transfers.
        engine: Moves the bytes.
        keep: Note in the run directories that they stay when the run ends.
        verify: Compare every read with the checksums of what was written.
        trace: Gets spans of reads and writes.

    Raises:
        StoreError: A directory cannot be made.
        ConfigurationError: ``options`` ask for O_DIRECT, and a file system refuses it.
        IOFailure: A disk failed.
    """
    # Each generation of each kind of each unit is an open file.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    directories: list[RunDirectory] = []
    try:
        for root in roots:
            warn_of_dead_runs(root)
            directories.append(RunDirectory(root, keep=keep))
        direct = [use_direct(options, directory.path) for directory in directories]
    except BaseException:
        with Ending() as ending:
            for directory in directories:
                ending.callback(partial(directory.close, remove=True))
            raise
    return StateStore(directories, engine, options=options, direct=direct, verify=verify, trace=trace)


def end_store(store: StateStore, *, remove: bool) -> None:
    """Close the files, and remove them; a disk that hangs does not keep the process from ending."""
    try:
        store.engine.patience.call(
            lambda: store.close(remove=remove), store.disks.all[0].path, "end of the run's files"
        )
    except IOFailure as error:
        warnings.warn(f"{error}; what is left there can be removed with: lightning-ssd clean", stacklevel=2)
