"""The bytes of a checkpoint that were compared with their checksums are those that training goes on from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightning_ssd.checkpoint import load
from lightning_ssd.errors import CheckpointError, CorruptionError, IOFailure
from tests.helpers.models import GPT
from tests.helpers.training import Result, assert_equal, streamed, train


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one model, whose files have equal names and sizes and other values."""
    folder = tmp_path_factory.mktemp("saved")
    for name, steps in (("good", 2), ("other", 3)):
        run(folder / name, steps).trainer.save_checkpoint(folder / f"saved-{name}.ckpt")
        os.rename(folder / f"saved-{name}.ckpt.links", folder / f"{name}.ckpt")  # the folder is a checkpoint by itself
    return folder


def run(folder: Path, steps: int, ckpt_path: Path | None = None) -> Result:
    net = lambda: GPT(layers=1)  # noqa: E731
    path = None if ckpt_path is None else str(ckpt_path)
    return train(folder, net, streamed(checkpoint="links"), max_steps=steps, precision="bf16-true", ckpt_path=path)


def exchange(good: Path, other: Path) -> None:
    for file in (good / "units").iterdir():
        shutil.copy(other / "units" / file.name, good / "new")
        os.replace(good / "new", file)


def after_call(patch: pytest.MonkeyPatch, what: str, number: int, act: Callable[[], None]) -> list[int]:
    """Do something after the ``number``-th call of a function; the list counts the calls."""
    calls, function = [0], getattr(load, what)

    def then_act(*args: Any) -> Any:
        found = function(*args)
        calls[0] += 1
        if calls[0] == number:
            act()
        return found

    patch.setattr(load, what, then_act)
    return calls


@pytest.mark.parametrize("what", ["checksum", "MappedFile"])
@pytest.mark.parametrize("is_bad_first", [False, True], ids=["bad later", "bad first"])
def test_files_that_take_the_place_of_those_compared_are_not_used(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, what: str, is_bad_first: bool
) -> None:
    """Whenever a file is exchanged, before or after its checksums: what is used is what was compared, or nothing is."""
    expected = run(tmp_path / "expected", 4, saved / "good.ckpt")
    with monkeypatch.context() as patch:
        calls = after_call(patch, what, 0, lambda: None)
        run(tmp_path / "count", 2, saved / "good.ckpt")
    num_used = 0
    for moment in (2, calls[0] // 2, calls[0]):
        good = tmp_path / f"{moment}.ckpt"
        shutil.copytree(saved / "good.ckpt", good)
        if is_bad_first:
            exchange(good, saved / "other.ckpt")
        with monkeypatch.context() as patch:
            new = saved / ("good.ckpt" if is_bad_first else "other.ckpt")
            after_call(patch, what, moment, partial(exchange, good, new))
            try:
                found = run(tmp_path / f"run {moment}", 4, good)
            except (CheckpointError, CorruptionError):
                continue
        assert found.losses == expected.losses
        assert_equal(expected, found)
        num_used += 1
    assert is_bad_first or num_used


@pytest.mark.parametrize("what", ["shortened", "written"])
@pytest.mark.parametrize("kind", ["param", "master", "exp_avg"])
def test_a_file_that_is_changed_after_it_was_compared_is_refused(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, what: str, kind: str
) -> None:
    good = tmp_path / "good.ckpt"
    shutil.copytree(saved / "good.ckpt", good)
    verify = load.CheckpointReader.verify

    def then_change(reader: load.CheckpointReader) -> object:
        report = verify(reader)
        for file in good.glob(f"units/*.{kind}.safetensors"):
            with open(file, "r+b") as opened:
                opened.seek(-8, os.SEEK_END)
                opened.write(b"changed.")
                if what == "shortened":
                    opened.truncate(100)
        return report

    monkeypatch.setattr(load.CheckpointReader, "verify", then_change)
    with pytest.raises((CheckpointError, IOFailure), match=r"was written to while a run resumed|read of"):
        run(tmp_path, 4, good)
