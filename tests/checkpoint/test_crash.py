"""A process that dies, or a disk that fails, at any call of `save`: the old checkpoint or the new one is whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ssd.checkpoint import directory
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.errors import CheckpointError
from lightning_ssd.saving.link_staging import remove_checkpoint
from tests.checkpoint.support import Training, assert_whole

CALLS = (
    "open", "mkdir", "link", "write", "pread", "fsync", "fdatasync", "posix_fallocate", "rename", "unlink", "rmdir",
)  # fmt: skip
RENAMING_CALLS = ("rename", "unlink", "rmdir", "fsync")
DIED = 77


@pytest.fixture
def fast(tmp_store: Path) -> Iterator[Path]:
    """In memory: dying loses no page cache, so a slow disk would only make the same test slower."""
    path = Path("/dev/shm") / f"lightning-ssd-crash-{os.getpid()}-{os.urandom(4).hex()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def training(fast: Path) -> Training:
    (fast / "live").mkdir()
    training = Training(fast / "live", shapes={"a": {"a.weight": (90, 70)}, "b": {"b.bias": (5,)}})
    training.advance()
    return training


def at_call(
    number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *, can_exchange: bool
) -> list[str]:
    """Have ``action`` happen before the ``number``-th system call; returns the calls made, as they are made."""
    made: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == number:
                action()
            return call(*args, **kwargs)

        return run

    # Without exchange only the last part differs: there it is enough to try what changes names.
    for name in CALLS if can_exchange else RENAMING_CALLS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    exchange = directory._exchange if can_exchange else lambda first, second: False
    monkeypatch.setattr(directory, "_exchange", counted("exchange", exchange))
    return made


def names(with_file: bool, target: str) -> list[str]:
    return [target, *([f"{target}.links"] if with_file else []), "live"]


def step_at(target: Path, with_file: bool) -> int:
    """The step of the checkpoint, whole, by each reader."""
    with CheckpointReader(target) as reader:
        step = reader.manifest.step
    if with_file:
        assert target.is_file()
        found = torch.load(target)
        assert found["loops"] == {"epoch": step}
        assert torch.equal(found["state_dict"]["buffer"], torch.arange(4) + step)
    return step


def die_at(number: int, training: Training, target: Path, can_exchange: bool, with_file: bool) -> bool:
    """Save in a child process that ends, without a word, before its ``number``-th call; False if it made fewer."""
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException), pytest.MonkeyPatch.context() as patch:
            at_call(number, lambda: os._exit(DIED), patch, can_exchange=can_exchange)
            training.save(target, with_file=with_file)
            code = 0
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, DIED)
    return code == DIED


@pytest.mark.parametrize(
    ("can_exchange", "with_file"), [(True, False), (False, False), (True, True)], ids=["exchange", "renames", "links"]
)
def test_dying_at_any_call(training: Training, fast: Path, can_exchange: bool, with_file: bool) -> None:
    target = fast / "last.ckpt"
    training.save(target, with_file=with_file)
    old_training, old = replace(training), training.step
    training.advance()
    training.files[0] = replace(training.files[0], linkable=False)
    outcomes: list[int] = []
    while die_at(len(outcomes) + 1, training, target, can_exchange, with_file):
        outcomes.append(step_at(target, with_file))
        assert_whole(target, training, outcomes[-1])
        # What the dead one left behind goes with the next save, which starts the next round from the old step.
        old_training.save(target, with_file=with_file)
        assert sorted(os.listdir(fast)) == names(with_file, "last.ckpt")
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {old, training.step}
    assert_whole(target, training, training.step)


@pytest.mark.parametrize("with_file", [False, True], ids=["directory", "links"])
def test_dying_before_there_was_a_checkpoint(training: Training, fast: Path, with_file: bool) -> None:
    target = fast / "first.ckpt"
    number = 1
    while die_at(number, training, target, True, with_file):
        if target.exists():
            assert step_at(target, with_file) == training.step
            assert_whole(target, training, training.step)
            assert remove_checkpoint(target)
        number += 3
    assert sorted(os.listdir(fast)) == names(with_file, "first.ckpt")


def test_dying_while_links_are_removed(training: Training, fast: Path) -> None:
    """The file is there and loads, or it is not there; what is left goes with the next save."""
    target = fast / "it.ckpt"
    number = num_whole = 0
    while True:
        training.save(target, with_file=True)
        number += 1
        child = os.fork()
        if child == 0:
            with suppress(BaseException), pytest.MonkeyPatch.context() as patch:
                at_call(number, lambda: os._exit(DIED), patch, can_exchange=True)
                remove_checkpoint(target)
            os._exit(0)
        is_dead = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DIED
        if target.exists():
            num_whole += 1
            assert step_at(target, True) == training.step
            assert_whole(target, training, training.step)
        if not is_dead:
            break
    assert num_whole > 0
    assert os.listdir(fast) == ["live"]


def save_fails(training: Training, target: Path, with_file: bool) -> bool:
    try:
        training.save(target, with_file=with_file)
    except CheckpointError as raised:
        if "No space left" not in str(raised):
            raise
        return True
    return False


@pytest.mark.parametrize("with_file", [False, True], ids=["directory", "links"])
def test_a_failing_disk_at_any_call(training: Training, fast: Path, with_file: bool) -> None:
    target = fast / "last.ckpt"
    training.save(target, with_file=with_file)
    old_training, old = replace(training), training.step
    training.advance()

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    outcomes: list[int] = []
    late = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            made = at_call(len(outcomes) + 1, fail, patch, can_exchange=True)
            failed = save_fails(training, target, with_file)
        if len(made) <= len(outcomes):
            break
        outcomes.append(step_at(target, with_file))
        assert_whole(target, training, outcomes[-1])
        if outcomes[-1] == old:
            left = sorted(os.listdir(fast))
            assert left == names(with_file, "last.ckpt"), f"call {len(outcomes)} left something behind"
        else:
            late += failed
            old_training.save(target, with_file=with_file)
    # Some failures do no harm (a parent directory that exists need not be made); after the new name only removing the
    # old checkpoint can fail.
    assert set(outcomes) == {old, training.step}
    assert 0 < late < 30
