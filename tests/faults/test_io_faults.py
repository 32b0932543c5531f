"""A disk that fails, tears, delays, reorders or lies: the run stops with the place, or the numbers do not change."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ssd.errors import CorruptionError, IOFailure
from lightning_ssd.io import select
from lightning_ssd.session import session as session_module
from tests.faults.support import finish_backward, small_gpt, streamed
from tests.helpers.faulty import Fault, FaultyEngine, Operation, When
from tests.helpers.training import Result, assert_equal, train

Inject = Callable[..., None]
STEPS = 5
PARAM, STATE = "*net.blocks.0.param.*", "*net.blocks.0.exp_avg.*"


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Makes every engine that sessions make from now on faulty."""

    def start(rule: Any) -> None:
        def make(options: Any) -> FaultyEngine:
            return FaultyEngine(select.make_engine(options), rule, deadline_s=options.deadline_s)

        monkeypatch.setattr(session_module, "make_engine", make)

    return start


def run(tmp_path: Path, **kwargs: Any) -> Result:
    settings = {name: kwargs.pop(name) for name in ("verify_reads", "overlap", "window") if name in kwargs}
    return train(tmp_path, small_gpt, streamed(**settings), max_steps=STEPS, **kwargs)


# One block, one step: its parameter file is read for forward, for recompute and for the update.
FAILURES: dict[str, tuple[When, str]] = {
    "parameters in the first forward": (When(Fault(error=errno.EIO), PARAM, is_write=False, nth=0), "param"),
    "parameters in forward": (When(Fault(error=errno.EIO), PARAM, is_write=False, nth=6), "param"),
    "parameters in backward": (When(Fault(error=errno.EIO), PARAM, is_write=False, nth=7), "param"),
    "parameters in the update": (When(Fault(error=errno.EIO), PARAM, is_write=False, nth=8), "param"),
    "state, read": (When(Fault(error=errno.EIO), STATE, is_write=False, nth=2), "exp_avg"),
    "state, written": (When(Fault(error=errno.EIO), STATE, is_write=True, nth=2), "exp_avg"),
    "state, half written": (When(Fault(error=errno.EIO, moved_nbytes=4096), STATE, is_write=True, nth=2), "exp_avg"),
    "parameters, half read": (When(Fault(error=errno.EIO, moved_nbytes=4096), PARAM, is_write=False, nth=7), "param"),
    "parameters, disk full": (When(Fault(error=errno.ENOSPC), PARAM, is_write=True, nth=3), "param"),
    "while they are placed": (When(Fault(error=errno.EIO), PARAM, is_write=True, nth=0), "param"),
}


@pytest.mark.parametrize(
    ("failure", "overlap"),
    [*product(FAILURES, ["auto"]), *product(("parameters in backward", "state, read", "state, written"), ["off"])],
)
def test_an_error_stops_the_run_and_the_last_checkpoint_resumes(
    tmp_path: Path, inject: Inject, monkeypatch: pytest.MonkeyPatch, failure: str, overlap: str
) -> None:
    fault, kind = FAILURES[failure]
    inject([fault])
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    with pytest.raises(IOFailure, match=rf"of \d+ bytes at offset \d+ of '.*net\.blocks\.0\.{kind}\.") as raised:
        run(tmp_path, callbacks=[saver], overlap=overlap, enable_checkpointing=True)
    assert raised.value.errno == fault.fault.error
    finish_backward()
    monkeypatch.undo()
    whole = run(tmp_path)
    saved = sorted((tmp_path / "saved").glob("*.ckpt")) if (tmp_path / "saved").is_dir() else []
    assert bool(saved) == (failure not in ("while they are placed", "parameters in the first forward"))
    if saved:
        rest = run(tmp_path, ckpt_path=str(saved[-1]))
        step = int(saved[-1].stem.removeprefix("step="))
        assert rest.losses == whole.losses[step:]
        rest.losses = whole.losses
        assert_equal(whole, rest)


def every_third_late(operation: Operation) -> Fault | None:
    return Fault(delay_s=0.003) if operation.index % 3 == 1 else None


def all_reads_late(operation: Operation) -> Fault | None:
    return None if operation.is_write else Fault(delay_s=0.001)


def all_writes_late(operation: Operation) -> Fault | None:
    return Fault(delay_s=0.001) if operation.is_write else None


@pytest.mark.parametrize("rule", [every_third_late, all_reads_late, all_writes_late])
@pytest.mark.parametrize("window", [1, 3])
def test_delays_and_reordering_change_nothing(
    tmp_path: Path, inject: Inject, rule: Callable[[Operation], Fault | None], window: int
) -> None:
    expected = run(tmp_path)
    inject(rule)
    assert_equal(expected, run(tmp_path, window=window))


@pytest.mark.parametrize("kind", ["param", "exp_avg", "exp_avg_sq"])
def test_a_flipped_bit_is_never_trained_on(tmp_path: Path, inject: Inject, kind: str) -> None:
    inject([When(Fault(flip_bit=12345), f"*net.blocks.1.{kind}.*", is_write=False, nth=2)])
    expected = (
        rf"unit 'net\.blocks\.1', kind '{kind}': .*\(parameters 'net\.blocks\.1\..*resume from the last checkpoint"
    )
    with pytest.raises(CorruptionError, match=expected):
        run(tmp_path, verify_reads=True)
    finish_backward()


@pytest.mark.parametrize("kind", ["param", "exp_avg"])
def test_a_file_damaged_between_two_steps_stops_the_run(tmp_path: Path, kind: str) -> None:
    class Damage(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                store = trainer.strategy.session.store  # type: ignore[attr-defined]
                generation = store.current("net.blocks.1", kind)
                with open(generation.file.path, "r+b") as file:
                    file.seek(generation.layout.data_begin + 77)
                    byte = file.read(1)[0]
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte ^ 0x40]))

    with pytest.raises(CorruptionError, match=rf"unit 'net\.blocks\.1', kind '{kind}'"):
        run(tmp_path, verify_reads=True, callbacks=[Damage()])
    finish_backward()


def test_a_parameter_that_cannot_be_read_after_the_run_is_an_error_with_its_name(tmp_path: Path) -> None:
    """It lies in a mapped file; one that was cut short does what a bad disk does."""
    result = train(tmp_path, small_gpt, streamed(keep_store=True), max_steps=1)
    param = dict(result.trainer.lightning_module.named_parameters())["net.blocks.1.up.weight"]
    (path,) = tmp_path.glob(".ssd_offload/*/*net.blocks.1.param*")
    os.truncate(path, 4096)
    with pytest.raises(
        IOFailure, match=r"param of unit 'net\.blocks\.1', parameter 'net\.blocks\.1\..*Input/output error"
    ):
        print(float(param.sum()))
