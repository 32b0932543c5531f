"""Every place where bytes or names go to a disk or come from one, and every way in which the disk may fail there.

A `Site` is found by what happens (which file, reading or writing, while what is done), not by who does it, so that the
list survives a rewriting of the code behind it.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from lightning_ssd.checkpoint import directory
from lightning_ssd.io import file as file_module
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.io.select import make_engine
from lightning_ssd.session import session as session_module
from tests.helpers.faulty import Fault, FaultyEngine, Operation

DELAY_S = 0.03
MOVED_NBYTES = 4096

ENGINE_FAULTS: dict[str, Fault] = {
    "EIO": Fault(error=errno.EIO),
    "ENOSPC": Fault(error=errno.ENOSPC),
    "short, then EIO": Fault(error=errno.EIO, moved_nbytes=MOVED_NBYTES),
    "torn, then EIO": Fault(error=errno.EIO, moved_nbytes=MOVED_NBYTES),
    "torn in silence": Fault(is_torn=True, moved_nbytes=0),
    "bit flip": Fault(flip_bit=12345),
    "delay": Fault(delay_s=DELAY_S),
}
READ_FAULTS = ("EIO", "short, then EIO", "bit flip", "delay")
WRITE_FAULTS = ("EIO", "ENOSPC", "torn, then EIO", "torn in silence", "delay")
CALL_FAULTS = ("EIO", "ENOSPC", "delay")
SYSTEM_READ_FAULTS = ("EIO", "short", "bit flip", "delay")
SYSTEM_WRITE_FAULTS = ("EIO", "ENOSPC", "short", "torn, then EIO", "bit flip", "delay")


@dataclass(frozen=True)
class Site:
    """One place.

    Attributes:
        name: What the table calls it.
        when: Part of the run it belongs to: place, train, save, copy (to another disk), flush
            (what is kept in memory is written to be saved), remove, load, export.
        calls: Functions of ``os`` that are used there; or "read" or "write" of an engine; or "reserve".
        path: Pattern of the file's path.
        nth: Which of the operations that match fails.
        faults: Ways to fail.
        settings: Of the strategy.
        trainer: Of the Trainer.
        keeps_inputs: Inputs of recomputed blocks wait on disk.
        by_engine: Whether an engine carries it, so that it is tried with each.
    """

    name: str
    when: str
    calls: tuple[str, ...]
    path: str
    faults: tuple[str, ...]
    nth: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    keeps_inputs: bool = False

    @property
    def by_engine(self) -> bool:
        return self.when in ("place", "train", "flush") and self.calls[0] in ("read", "write")


RUN, SAVING = "*ssd-run-*", "*/.step=3.ckpt.links.tmp-*"
CLIP = {"gradient_clip_val": 0.5}
ROOMY = {"host_memory": "512MiB"}

SITES: tuple[Site, ...] = (
    # -- the store ---------------------------------------------------------------------------------------------------
    Site("reserve a file, parameters placed", "place", ("reserve",), f"{RUN}param*", ("EIO", "ENOSPC", "delay"), nth=1),
    Site("reserve a file, update", "train", ("reserve",), f"{RUN}exp_avg.*", ("EIO", "ENOSPC", "delay"), nth=4),
    Site("header written", "train", ("pwrite",), f"{RUN}.safetensors", ("EIO", "ENOSPC", "short", "delay"), nth=14),
    Site("parameters placed (staging)", "place", ("write",), f"{RUN}blocks.0.param.*", WRITE_FAULTS),
    Site("parameters fetched, first forward", "train", ("read",), f"{RUN}blocks.0.param.*", READ_FAULTS),
    Site("parameters fetched, forward", "train", ("read",), f"{RUN}blocks.0.param.*", READ_FAULTS, nth=6),
    Site("parameters prefetched", "train", ("read",), f"{RUN}blocks.1.param.*", READ_FAULTS, nth=6,
         settings={"window": 3}),
    Site("parameters fetched, backward", "train", ("read",), f"{RUN}blocks.0.param.*", READ_FAULTS, nth=7),
    Site("state read", "train", ("read",), f"{RUN}blocks.0.exp_avg.*", READ_FAULTS, nth=2),
    Site("state written (chunk)", "train", ("write",), f"{RUN}blocks.0.exp_avg.*", WRITE_FAULTS, nth=2),
    Site("parameters written (update)", "train", ("write",), f"{RUN}blocks.0.param.*", WRITE_FAULTS, nth=3),
    Site("state written, update after backward", "train", ("write",), f"{RUN}blocks.0.exp_avg.*", WRITE_FAULTS, nth=2,
         trainer=CLIP),
    Site("master read, bf16-true", "train", ("read",), f"{RUN}blocks.0.master.*", READ_FAULTS, nth=1,
         trainer={"precision": "bf16-true"}),
    Site("gradient spilled: file reserved", "train", ("reserve",), f"{RUN}grad*", ("EIO", "ENOSPC", "delay"), nth=0,
         trainer=CLIP),
    Site("saved input written", "train", ("write",), "*activations-*.spill", WRITE_FAULTS, nth=2, keeps_inputs=True),
    Site("saved input read", "train", ("read",), "*activations-*.spill", READ_FAULTS, nth=2, keeps_inputs=True),
    # -- saving ------------------------------------------------------------------------------------------------------
    Site("state kept in memory, written to be saved", "train", ("write",), f"{RUN}blocks.0.exp_avg.*", WRITE_FAULTS,
         nth=2, settings=ROOMY),
    Site("parameters kept in memory, written to be saved", "flush", ("write",), f"{RUN}blocks.0.param.*", WRITE_FAULTS,
         settings=ROOMY),
    Site("file of what is kept reserved", "train", ("reserve",), f"{RUN}exp_avg.*", ("EIO", "ENOSPC", "delay"),
         nth=13, settings=ROOMY),
    Site("generation synced", "save", ("fdatasync", "fsync"), f"{RUN}.safetensors", CALL_FAULTS, nth=0),
    Site("generation opened to be linked", "save", ("open",), f"{RUN}.safetensors", ("EIO", "delay"), nth=20),
    Site("generation linked", "save", ("link",), f"{SAVING}/units/*", CALL_FAULTS, nth=3),
    Site("generation copied: read", "copy", ("pread",), f"{RUN}.safetensors", SYSTEM_READ_FAULTS, nth=3),
    Site("generation copied: space", "copy", ("posix_fallocate",), f"{SAVING}/units/*", CALL_FAULTS, nth=1),
    Site("generation copied: written", "copy", ("write",), f"{SAVING}/units/*", SYSTEM_WRITE_FAULTS, nth=1),
    Site("generation copied: synced", "copy", ("fsync", "fdatasync"), f"{SAVING}/units/*", CALL_FAULTS, nth=1),
    Site("staging directory made", "save", ("mkdir",), SAVING, CALL_FAULTS, nth=0),
    Site("buffers.safetensors written", "save", ("write",), f"{SAVING}/buffers.safetensors", SYSTEM_WRITE_FAULTS),
    Site("state.pt written", "save", ("write",), f"{SAVING}/state.pt", SYSTEM_WRITE_FAULTS, nth=2),
    Site("manifest written", "save", ("write",), f"{SAVING}/manifest.json", SYSTEM_WRITE_FAULTS),
    Site("small files synced", "save", ("fsync",), f"{SAVING}/*.*", CALL_FAULTS, nth=1),
    Site("units directory synced", "save", ("fsync",), f"{SAVING}/units", CALL_FAULTS),
    Site("checkpoint takes its name", "save", ("rename",), SAVING, CALL_FAULTS),
    Site("its folder synced", "save", ("fsync",), "*/saved", CALL_FAULTS, nth=0),
    # -- removing ----------------------------------------------------------------------------------------------------
    Site("old checkpoint renamed", "remove", ("rename",), "*/saved/step=1.ckpt.links", ("EIO", "delay")),
    Site("old checkpoint's files removed", "remove", ("unlink",), "*/.step=1.ckpt.links.tmp-*", ("EIO", "delay"),
         nth=2),
    # -- loading -----------------------------------------------------------------------------------------------------
    Site("manifest read", "load", ("pread",), "*/step=4.ckpt.links/manifest.json", SYSTEM_READ_FAULTS, nth=1),
    Site("unit file verified", "load", ("pread",), "*/step=4.ckpt.links/units/*", SYSTEM_READ_FAULTS, nth=3),
    Site("small file verified", "load", ("pread",), "*/step=4.ckpt.links/state.pt", SYSTEM_READ_FAULTS),
    Site("unit file opened", "load", ("open",), "*/step=4.ckpt.links/units/*", ("EIO", "delay"), nth=2),
    # -- exporting ---------------------------------------------------------------------------------------------------
    Site("export: state read", "export", ("pread",), "*/step=4.ckpt.links/state.pt", SYSTEM_READ_FAULTS),
    Site("export: written", "export", ("write",), "*/export/*", (*SYSTEM_WRITE_FAULTS[:4], "delay"), nth=2),
    Site("export: synced", "export", ("fsync",), "*/export/*", CALL_FAULTS),
    Site("export: takes its name", "export", ("replace",), "*/export/*", ("EIO", "delay")),
)  # fmt: skip


class Injector:
    """Makes one operation at a site fail.

    Attributes:
        hits: How many operations were made to fail: 1, or 0 if the run did not get there.
        is_armed: Whether it counts; the test switches it on for the part of the run that the site belongs to.
    """

    def __init__(self, site: Site, fault: str, engine: str) -> None:
        self.hits = 0
        self.is_armed = False
        self._site = site
        self._fault = fault
        self._engine = engine
        self._num_matches = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session_module, "make_engine", self._make_engine)
            if self._site.calls == ("reserve",):
                patch.setattr(file_module, "_reserve", self._wrapped("reserve", file_module._reserve))
            elif not self._site.by_engine:
                for name in self._site.calls:
                    patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            if self._site.when == "copy":
                patch.setattr(os, "link", self._cannot_link(os.link))
            if "rename" in self._site.calls:
                # What exchanges two names gives them both, as a rename does.
                patch.setattr(directory, "_exchange", self._wrapped("rename", directory._exchange))
            yield

    def _make_engine(self, options: IOOptions) -> FaultyEngine:
        return FaultyEngine(make_engine(options), self._on_operation, deadline_s=options.deadline_s)

    def _on_operation(self, operation: Operation) -> Fault | None:
        if (
            not self._site.by_engine
            or operation.is_write != (self._site.calls[0] == "write")
            or not self._is_due(operation.path)
        ):
            return None
        fault = ENGINE_FAULTS[self._fault]
        if fault.flip_bit is not None:
            return Fault(flip_bit=fault.flip_bit % (8 * operation.nbytes))
        return fault

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.is_armed or not self._is_due(_path_of(name, args, kwargs)):
                return call(*args, **kwargs)
            return _failing(self._fault, name, call, *args, **kwargs)

        return run

    def _cannot_link(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.is_armed:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return call(*args, **kwargs)

        return run

    def _is_due(self, path: str) -> bool:
        if not self.is_armed or not fnmatch.fnmatch(path, self._site.path):
            return False
        self._num_matches += 1
        self.hits += self._num_matches == self._site.nth + 1
        return self._num_matches == self._site.nth + 1


def _path_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    which = args[1] if name == "link" else args[0]
    if isinstance(which, int):
        return os.readlink(f"/proc/self/fd/{which}")
    folder = kwargs.get({"link": "dst_dir_fd", "rename": "src_dir_fd", "replace": "src_dir_fd"}.get(name, "dir_fd"))
    return os.fspath(which) if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), which)


def _failing(fault: str, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if fault == "delay":
        time.sleep(DELAY_S)
        return call(*args, **kwargs)
    if fault in ("EIO", "ENOSPC"):
        code = getattr(errno, fault)
        # The system names the file in an error of a path, not in one of a descriptor.
        raise OSError(code, os.strerror(code), *([args[0]] if isinstance(args[0], str) else []))
    if name == "pread":
        fd, nbytes, offset = args
        if fault == "short":
            return call(fd, max(1, nbytes // 2), offset)
        data = bytearray(call(*args))
        data[len(data) // 2] ^= 4
        return bytes(data)
    fd, data, *rest = args
    view = memoryview(data).cast("B")
    if fault == "bit flip":
        changed = bytearray(view)
        changed[len(changed) // 2] ^= 4
        return call(fd, changed, *rest)
    written = call(fd, view[: max(1, view.nbytes // 2)], *rest)
    if fault == "short":
        return written
    raise OSError(errno.EIO, os.strerror(errno.EIO))
