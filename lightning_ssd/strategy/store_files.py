"""The store of a run: opened on the disks that the user named, and removed at the end."""

from __future__ import annotations

import resource
import warnings
from functools import partial

from lightning_ssd.errors import Ending, IOFailure
from lightning_ssd.io.engine import Engine
from lightning_ssd.io.select import make_engine, use_direct
from lightning_ssd.store.run_directory import RunDirectory, warn_of_dead_runs
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.strategy.settings import Settings
from lightning_ssd.trace.recorder import Trace


def open_store(settings: Settings, engine: Engine, trace: Trace) -> StateStore:
    """A new store with a run directory on each disk of ``settings``.

    Raises:
        IOFailure: A directory cannot be made.
    """
    # Each generation of each kind of each unit is an open file.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    directories: list[RunDirectory] = []
    try:
        for root in settings.roots:
            warn_of_dead_runs(root)
            directories.append(RunDirectory(root, keep=settings.keep_store))
        direct = [use_direct(settings.io, directory.path) for directory in directories]
    except BaseException:
        with Ending() as ending:
            for directory in directories:
                ending.callback(partial(directory.close, remove=True))
            raise
    return StateStore(
        directories,
        engine,
        direct=direct,
        verify=settings.verify,
        trace=trace,
        new_engine=partial(make_engine, settings.io),
    )


def end_store(store: StateStore, *, remove: bool) -> None:
    """Close the files, and remove them; a disk that hangs does not keep the process from ending."""
    try:
        store.engine.patience.call(lambda: store.close(remove=remove), store.spill_directory, "end of the run's files")
    except IOFailure as error:
        warnings.warn(f"{error}; what is left there can be removed with: lightning-ssd clean", stacklevel=2)
