"""A dry run of a save: shows before the first step whether checkpoints can be written to a directory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor

from lightning_ssd.checkpoint.contents import CheckpointContent
from lightning_ssd.checkpoint.directory import remove
from lightning_ssd.checkpoint.unit_file import ComposedFile, UnitFile
from lightning_ssd.checkpoint.writer import lay_out
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.deadline import in_time
from lightning_ssd.saving.write import write_checkpoint

_WAIT_S = 10.0


def probe_save(folder: str, stores: Sequence[str]) -> float:
    """Save a checkpoint of a few bytes in ``folder`` by what saves real ones, and remove it.

    Missing folders are made, and removed again. The names are those of an unfinished save, so that
    ``lightning-ssd clean`` finds what a killed process leaves behind.

    Args:
        folder: Where checkpoints are going to be saved.
        stores: Directories of the live store; each holds a small file meanwhile.

    Returns:
        The share of ``stores`` whose files can be hard-linked into ``folder``; those of the others must be copied.

    Raises:
        CheckpointError: If no checkpoint can be saved, or a saved one not removed, in ``folder``.
    """
    name = f"probe.tmp-{os.getpid()}-{os.urandom(8).hex()}"
    target = os.path.join(folder, f".{name}")
    sources = [os.path.join(store, f"{name}.safetensors") for store in stores]
    try:
        with _without_traces(folder), _files(sources) as files:
            done = write_checkpoint(target, CheckpointContent(files), progress=lambda done, total: None)
            _remove(target)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"no checkpoint can be saved in {folder!r}, as a trial shows: {error.__cause__ or error}; make it writable "
            "for this user, free space there, or choose another directory for the checkpoints (dirpath)"
        ) from error
    return done.nbytes_linked / sum(file.nbytes for file in files)


def _remove(target: str) -> None:
    """Remove the saved probe. Its lock is free now, so ``lightning-ssd clean`` may remove it first."""
    end_s = time.monotonic() + _WAIT_S
    while os.path.lexists(target):
        try:
            remove(target)
        except CheckpointError as error:
            is_failed = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)
            if is_failed or time.monotonic() > end_s:
                raise
            time.sleep(0.01)


class _Zero:
    """A `TensorSource` of one element."""

    entries = lay_out([("probe", "F32", (1,))])

    def tensor(self, name: str) -> Tensor:
        return torch.zeros(1)

    def drop(self, name: str) -> None:
        """Nothing: it is small."""


@contextmanager
def _files(paths: Sequence[str]) -> Iterator[list[UnitFile]]:
    """Small files in place of the generations of a store."""
    source = _Zero()
    files: list[UnitFile] = []
    try:
        for path in paths:
            made = ComposedFile("probe", "param", source.entries, source)
            sums = made.write(path, lambda nbytes: None)
            kind = f"param-{len(files)}"  # a checkpoint has each kind of a unit once
            files.append(UnitFile("probe", kind, path, True, source.entries, sums, made.data_begin))
        yield files
    finally:
        for path in paths:
            with suppress(FileNotFoundError):
                in_time(partial(os.unlink, path), path, "unlink")


@contextmanager
def _without_traces(folder: str) -> Iterator[None]:
    """Remove, on leaving, the parent folders of ``folder`` that did not exist before, if they are empty."""
    missing: list[str] = []
    path = os.path.abspath(folder)
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                in_time(partial(os.rmdir, path), path, "rmdir")
