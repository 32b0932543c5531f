"""Faults below the system: a file system that fails is mounted, and everything of a run lies on it.

What the other tests do to our calls, the disk does here to the kernel's, so page cache, write-back, mapped memory and
io_uring are in between. Needs root and ``/dev/fuse``.

``LIGHTNING_SSD_FAULTS_TABLE=docs/results/faults.md python -m pytest -q -n 0 tests/faults/test_faulty_disk.py -m soak``
writes what came of each into ``faulty_disk.md`` beside it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.errors import CheckpointError, CorruptionError, IOFailure, SSDOffloadError
from lightning_ssd.io.engine import IOOptions
from tests.faults.support import finish_backward, small_gpt, streamed
from tests.helpers.faulty_disk import REPOSITORY, Disk, DiskRule, faulty_disk
from tests.helpers.training import Result, train

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"),
    # torch keeps the nodes of a backward that failed, and they what the session had, until the next one.
    pytest.mark.filterwarnings("ignore"),
]
RUN, SAVED = "*ssd-run-*", "saved/*"
CLIP = {"gradient_clip_val": 0.5}
LIMIT_S = 60.0
TABLE = os.environ.get("LIGHTNING_SSD_FAULTS_TABLE")
HEAD = """# Faults of a disk

What comes of faults that a file system below a run makes (FUSE, over a real one), from the third step on. Written by
`tests/faults/test_faulty_disk.py` (its first lines say how), which also checks that the run ends within a minute, that
what was saved before is whole, and that the run goes on from it to the same losses. Where the disk hangs, that the
process ends; the disk had a second to answer.

| what fails | engine | what comes of it |
| --- | --- | --- |
"""

# What fails, from the end of the second step on, and what the error says if there is one.
FAULTS: dict[str, tuple[DiskRule, str]] = {
    "parameters read, EIO": (DiskRule("read", f"{RUN}blocks.0.param*", "EIO"), "Input/output error"),
    "parameters read, flipped": (DiskRule("read", f"{RUN}blocks.0.param*", "flip"), "not the bytes"),
    "parameters read, short": (DiskRule("read", f"{RUN}blocks.0.param*", "short", 0), "Input/output error"),
    "state read, EIO": (DiskRule("read", f"{RUN}blocks.0.exp_avg.*", "EIO"), "Input/output error"),
    "state read, flipped": (DiskRule("read", f"{RUN}blocks.0.exp_avg.*", "flip"), "not the bytes"),
    "state written, EIO": (DiskRule("write", f"{RUN}blocks.0.exp_avg.*", "EIO"), "Input/output error"),
    "state written, no space": (DiskRule("write", f"{RUN}blocks.0.exp_avg.*", "ENOSPC"), "No space left"),
    "state written, short": (DiskRule("write", f"{RUN}blocks.0.exp_avg.*", "short", 1), "Input/output error"),
    "state written, flipped": (DiskRule("write", f"{RUN}blocks.0.exp_avg.*", "flip"), "not the bytes|damaged"),
    "file recycled, EIO": (DiskRule("rename", RUN, "EIO"), "rename of .*Input/output error"),
    "file made, no space": (DiskRule("create", f"{RUN}", "ENOSPC"), "No space left"),
    "saving: synced, EIO": (DiskRule("fsync", "*", "EIO"), "could not be saved: .*Input/output error"),
    "saving: linked, EIO": (DiskRule("link", SAVED, "EIO"), "could not be saved: .*Input/output error"),
    "saving: written, no space": (DiskRule("write", "saved/*state.pt", "ENOSPC"), "could not be saved: .*No space"),
    "saving: takes its name, EIO": (DiskRule("rename", "saved/*", "EIO"), "could not be saved: .*Input/output error"),
    "saving: directory, EIO": (DiskRule("mkdir", "saved/*", "EIO"), "could not be saved: .*Input/output error"),
}


@pytest.fixture(scope="module")
def rows() -> Iterator[list[tuple[str, str, str]]]:
    """What fails, the engine, what comes of it."""
    found: list[tuple[str, str, str]] = []
    yield found
    if TABLE:
        lines = [f"| {name} | {engine} | {outcome} |" for name, engine, outcome in found]
        Path(TABLE).with_name("faulty_disk.md").write_text(HEAD + "\n".join(lines) + "\n")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with faulty_disk(tmp_path) as disk:
        yield disk
        gc.collect()  # runs end while their disk is there


class Arm(pl.Callback):
    """Sets a rule when the second step is saved."""

    def __init__(self, disk: Disk, rule: DiskRule) -> None:
        self._disk = disk
        self._rule = rule

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            self._disk.set_rules(self._rule)


def run(folder: Path, *callbacks: pl.Callback, **kwargs: Any) -> Result:
    every = kwargs.pop("every", 1)  # where each step is saved, no file is used again
    saver = ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=every, save_top_k=-1)
    strategy = streamed(verify_reads=True, io=IOOptions(engine=kwargs.pop("engine", "auto")))
    options: dict[str, Any] = {"max_steps": 4, "enable_checkpointing": True, "callbacks": [*callbacks, saver]}
    return train(folder, small_gpt, strategy, **(options | kwargs))


def plain(text: str, folder: Path) -> str:
    """Without what differs from run to run."""
    text = re.sub(r"ssd-run-[\w-]+", "ssd-run", text.replace(str(folder), ""))
    text = re.sub(r"\.(tmp|old|probe)-[\w-]+", r".\1", text)
    text = re.sub(r"\([\d.]+ [KMGT]iB free\)", "(... free)", re.sub(r"/\d{8}-", "/", text))
    return text.replace("|", "\\|").replace("\n", " ")


def good(folder: Path) -> list[Path]:
    """Checkpoints that verify, by step."""
    found = []
    for path in sorted(folder.glob("[!.]*.ckpt")):
        try:
            with CheckpointReader(path) as reader:
                reader.verify()
            found.append(path)
        except (CheckpointError, CorruptionError):
            pass
    return found


@pytest.mark.parametrize("engine", ["uring", "posix"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_disk_is_one_error_of_ours_or_nothing(
    tmp_path: Path, disk: Disk, name: str, engine: str, rows: list[tuple[str, str, str]]
) -> None:
    rule, says = FAULTS[name]
    if engine == "posix" and rule.operation not in ("read", "write"):
        engine = "auto"  # no engine is in between
    whole = run(tmp_path / "whole", engine=engine)
    error: SSDOffloadError | None = None
    result: Result | None = None
    try:
        result = run(disk.path, Arm(disk, rule), engine=engine, every=2 if name.startswith("file recycled") else 1)
    except SSDOffloadError as raised:
        error = raised.with_traceback(None)
        error.__cause__ = error.__context__ = None
    finish_backward()
    assert disk.set_rules() > 0, f"the run did not get there: {error}"
    if error is not None:
        assert re.search(says, str(error)), str(error)
    else:
        assert result is not None
        assert rule.fault in ("short", "flip")  # what was written wrong last is found when it is read
        assert result.losses == whole.losses
    outcome = "no effect, or found when it is read" if error is None else f"{type(error).__name__}: {error}"
    rows.append((name, engine, plain(outcome, disk.path)))
    saved = good(disk.path / "saved")
    assert saved, "what was saved before is whole"
    step = int(saved[-1].stem.removeprefix("step="))
    rest = run(disk.path, engine=engine, max_steps=5, ckpt_path=str(saved[-1]))
    assert rest.losses[: 4 - step] == whole.losses[step:]


def test_gradients_that_could_not_be_written_back_are_not_trained_on(disk: Disk) -> None:
    """The kernel tells a failed write-back to nobody who only reads the mapping."""

    class WriteBack(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                disk.set_rules(DiskRule("write", "*grad*", "EIO"))
                fd = os.open(disk.path, os.O_RDONLY)
                ctypes.CDLL(None).syncfs(fd)
                os.close(fd)

    with pytest.raises(IOFailure, match=r"write of gradients of unit 'net.*Input/output error.*resume from"):
        run(disk.path, WriteBack(), **CLIP)
    assert disk.set_rules() > 0
    finish_backward()
    assert len(good(disk.path / "saved")) == 2


def test_a_parameter_that_cannot_be_read_between_steps_is_an_error_with_its_name(disk: Disk) -> None:
    """Mapped values: without care the process ends by SIGBUS."""

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
            if trainer.global_step == 2:
                param = dict(module.named_parameters())["net.blocks.1.up.weight"]
                disk.set_rules(DiskRule("read", f"{RUN}blocks.1.param*", "EIO"))
                with pytest.raises(IOFailure, match=r"param of unit 'net\.blocks\.1', parameter .*Input/output error"):
                    print(float(param.sum()))
                assert disk.set_rules() > 0

    run(disk.path, enable_checkpointing=False, callbacks=[Look()])


# What hangs at the nth such operation. With io_uring: a thread that waits inside pread of a disk without an answer
# cannot be killed by anybody, and keeps its process.
HANGS: dict[str, DiskRule] = {
    "read": DiskRule("read", f"{RUN}blocks.0.param*", "hang", 4),
    "write": DiskRule("write", f"{RUN}blocks.0.exp_avg.*", "hang", 3),
    "fsync": DiskRule("fsync", "*", "hang", 4),
    "rename": DiskRule("rename", f"{RUN}.safetensors", "hang", 0),
    "create": DiskRule("create", f"{RUN}exp_avg*", "hang", 1),
    "link": DiskRule("link", "saved/*", "hang", 3),
    "a checkpoint's name": DiskRule("rename", "saved/*", "hang", 0),
    "unlink": DiskRule("unlink", "*", "hang", 3),
}


@pytest.mark.parametrize("name", HANGS)
def test_a_disk_that_hangs_is_an_error_and_the_process_ends(
    disk: Disk, name: str, rows: list[tuple[str, str, str]]
) -> None:
    disk.set_rules(HANGS[name])
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.hanging", str(disk.path), "uring", "{}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S)
    assert disk.set_rules() == 1, f"the run did not get there: {done.stdout}"
    assert done.returncode == 1
    assert "raised " in done.stdout
    assert "io.deadline_s" in done.stdout
    said = done.stdout[done.stdout.index("raised ") + len("raised ") :].splitlines()[0]
    rows.append((f"hangs: {name}", "uring", plain(said, disk.path)))
    assert "Error: " in done.stderr.splitlines()[-1]
