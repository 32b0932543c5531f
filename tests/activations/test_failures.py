"""The store of saved inputs when disks fail, frames are given up, or it is closed: errors that name, nothing lost."""

from __future__ import annotations

import errno
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from lightning_ssd.activations import spill_files as spill
from lightning_ssd.activations.store import FrameInputs
from lightning_ssd.errors import CorruptionError, DeadlineError, IOFailure, SSDOffloadError
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.io.python_engine import PythonEngine
from tests.helpers.activations import (
    NBYTES,
    bench,
    faulty,
    keep,
    keep_and_load,
    load_all,
    load_in_reverse,
)
from tests.helpers.faulty import Fault, FaultyEngine, When
from tests.helpers.pools import num_lent


@pytest.mark.parametrize("budget", [0, 6 * NBYTES])
@pytest.mark.parametrize("nth", [0, 5])
def test_a_failed_write_names_unit_and_file(tmp_store: Path, nth: int, budget: int) -> None:
    with faulty(tmp_store, When(Fault(error=errno.EIO), is_write=True, nth=nth), budget=budget) as b:
        frames: list[FrameInputs] = []
        with pytest.raises(IOFailure, match=r"unit 'unit \d+': writing an input.*activations-0000\.spill") as caught:
            keep_and_load(b, 12, frames)
        assert caught.value.errno == errno.EIO
        b.store.abort()
        del frames, caught  # its traceback holds what the failed calls had in hand
        gc.collect()
        b.assert_all_returned()


@pytest.mark.parametrize("budget", [0, 3 * NBYTES])
@pytest.mark.parametrize("nth", [0, 1, 7])
def test_a_failed_read_names_unit_and_file(tmp_store: Path, nth: int, budget: int) -> None:
    with faulty(
        tmp_store, When(Fault(error=errno.EIO), is_write=False, nth=nth % (2 if budget else 8)), budget=budget
    ) as b:
        frames = keep(b, *range(6))
        with pytest.raises(IOFailure, match=r"unit 'unit \d+': reading an input.*activations-0000\.spill"):
            load_all(frames)
        b.store.abort()
        frames.clear()
        b.assert_all_returned()


def test_a_disk_that_does_not_answer_keeps_its_memory(tmp_store: Path) -> None:
    engine = FaultyEngine(PythonEngine(IOOptions()), [When(Fault(hold=True), is_write=False, nth=0)], deadline_s=0.2)
    with bench(tmp_store, engine, budget=0) as b:
        frames = keep(b, 0, 1)
        with pytest.raises(DeadlineError, match=r"unit 'unit 1': reading an input"):
            frames[1].load()
        frames.clear()
        b.store.enforce_budget()
        assert num_lent(b.pool) == 1  # the one that the engine may still write to
        assert b.in_use_nbytes == NBYTES
        engine.release()
        b.assert_all_returned()


def test_a_full_disk_names_the_unit(tmp_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, limit = spill.File.create, [NBYTES]

    def full(path: str, nbytes: int, **options: Any) -> spill.File:
        if nbytes > limit[0]:
            raise IOFailure(errno.ENOSPC, path, 0, nbytes, "create")
        return create(path, nbytes, **options)

    monkeypatch.setattr(spill.File, "create", full)
    with bench(tmp_store) as b:
        frames = keep(b, 0)
        assert b.disk_nbytes == NBYTES  # more is tried first, then just what is needed
        limit[0] = 0
        with pytest.raises(IOFailure, match=r"unit 'unit 1': making room on disk.*No space left"):
            keep(b, 1)
        load_in_reverse(frames, 0)


@pytest.mark.parametrize("budget", [0, 3 * NBYTES])
def test_a_flipped_bit_is_found(tmp_store: Path, budget: int) -> None:
    with faulty(tmp_store, When(Fault(flip_bit=77), is_write=False, nth=1), budget=budget, verify=True) as b:
        frames = keep(b, *range(6))
        with pytest.raises(CorruptionError, match=r"unit 'unit \d+'.*activations-0000\.spill"):
            load_all(frames)


def test_frames_without_backward_return_everything(tmp_store: Path) -> None:
    with bench(tmp_store, budget=2 * NBYTES) as b:
        frames = keep(b, *range(6))
        frames[-1].load()  # and what this has read ahead
        frames.clear()
        b.assert_all_returned()


def test_a_step_that_was_given_up_returns_what_was_read_ahead(tmp_store: Path) -> None:
    with bench(tmp_store, budget=0) as b:
        frames = keep(b, *range(4))
        frames[3].load()
        b.store.abort()
        b.store.enforce_budget()
        b.store._io.drop_abandoned()
        load_in_reverse(frames, *range(4))  # values stay as long as their frames
        b.assert_all_returned()


def test_closing_ends_it(tmp_store: Path) -> None:
    with bench(tmp_store, budget=0) as b:
        frames = keep(b, *range(4))
        frames[3].load()
        b.store.close()
        b.store.close()
        with pytest.raises(SSDOffloadError, match="run the forward again"):
            frames[0].load()
        ref = weakref.ref(b.store)
        del frames, b
    gc.collect()
    assert ref() is None
