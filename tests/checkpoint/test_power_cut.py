"""A power cut at any moment of saving, replacing and removing: what had not been synced is gone, or there, in any
combination; every checkpoint that has a name is whole, and one that was saved is still there."""

from __future__ import annotations

import ast
import errno
import itertools
import os
import random
import shutil
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_ssd.checkpoint import directory, link_file, writer
from lightning_ssd.checkpoint.directory import is_checkpoint
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io import folder
from lightning_ssd.io.folder import Folder
from lightning_ssd.saving import link_staging, write
from lightning_ssd.saving.link_staging import remove_checkpoint
from tests.checkpoint.support import Training, assert_whole
from tests.helpers.power_cut import Cut, after, cuts, tree, write_tree
from tests.helpers.recorder import READING, Recorder, UnknownOperation

SHAPES = {"a": {"a.weight": (9, 7)}, "b": {"b.bias": (5,)}}


@pytest.fixture
def disk() -> Iterator[Path]:
    """In memory: what is lost with the power is decided by the simulation, so a real disk would only be slower."""
    path = Path("/dev/shm") / f"lightning-ssd-power-{os.getpid()}-{os.urandom(4).hex()}"
    (path / "root" / "live").mkdir(parents=True)
    yield path
    shutil.rmtree(path)


class Run:
    """A training whose file operations are recorded."""

    def __init__(self, disk: Path, *, with_file: bool) -> None:
        self.with_file = with_file
        self.root = disk / "root"
        self.scratch = disk / "scratch"
        self.training = Training(self.root / "live", shapes=SHAPES)
        self.recorder = Recorder(self.root)
        self._numbers = itertools.count()

    def save(self, name: str, *, copied: int = 0) -> None:
        """Train a step and save it; the first ``copied`` files are not linked."""
        self.training.advance()
        files = self.training.files
        self.training.files = [replace(file, linkable=False) for file in files[:copied]] + files[copied:]
        self.recorder.mark(f"save {name} {self.training.step}")
        self.training.save(self.root / name, recycle=self.recycle, with_file=self.with_file)
        self.recorder.mark(f"saved {name} {self.training.step}")

    def remove(self, name: str) -> None:
        self.recorder.mark(f"remove {name} 0")
        assert remove_checkpoint(self.root / name, self.recycle)
        self.recorder.mark(f"removed {name} 0")

    def recycle(self, path: str, folder: Folder) -> bool:
        """As the store does: the file goes to the live ones and is written over at once."""
        again = self.root / "live" / f"recycled-{next(self._numbers)}"
        os.rename(path, again)
        fd = os.open(again, os.O_WRONLY | os.O_CLOEXEC)
        os.pwrite(fd, b"another generation " * 20, 4096)
        os.close(fd)
        return True

    def check(self, begin: int = 0, num_random: int = 12, *, prefixes: bool = True) -> int:
        """Cut the power before every operation from ``begin`` on; returns how many different disks that left."""
        self.recorder.check()
        ops, rng = self.recorder.ops, random.Random(1)
        seen = set()
        for at in range(begin, len(ops) + 1):
            for cut in cuts(ops, at, rng, num_random, prefixes=prefixes):
                found = tree(after(ops, cut), ops)
                promised = self._promises(at)
                # Live files and the insides of unfinished directories do not matter to whoever looks for a checkpoint.
                visible = {p: c for p, c in found.items() if not p.startswith("live/") and ".tmp-" not in p}
                key = (tuple(visible.items()), tuple(sorted(promised.items())))
                if key not in seen:
                    seen.add(key)
                    self._check_disk(found, promised, cut)
        return len(seen)

    def _promises(self, at: int) -> dict[str, frozenset[int]]:
        """Steps of which one must be under a name now; 0 is none."""
        promised: dict[str, frozenset[int]] = {}
        for op in self.recorder.ops[:at]:
            if op.kind == "mark":
                word, name, step = op.data.decode().split()
                if word in ("saved", "removed"):
                    promised[name] = frozenset({int(step)})
                else:
                    promised[name] = promised.get(name, frozenset({0})) | {int(step)}
        return promised

    def _check_disk(self, found: dict[str, bytes | str | None], promised: dict[str, frozenset[int]], cut: Cut) -> None:
        self.scratch.mkdir()
        try:
            write_tree({p: c for p, c in found.items() if p != "live" and not p.startswith("live/")}, self.scratch)
            for name, steps in promised.items():
                step = self._step_under(self.scratch / name)
                assert step in steps, f"{name} is of step {step}, not of {set(steps)}, after {cut}"
            for path in self.scratch.rglob("[!.]*/manifest.json"):
                if not any(part.startswith(".") for part in path.relative_to(self.scratch).parts):
                    name = str(path.parent.relative_to(self.scratch))
                    assert name.removesuffix(".new").removesuffix(".links") in promised, f"{path} after {cut}"
        except Exception as error:
            raise AssertionError(f"{error} after {self._story(cut)}") from error
        finally:
            shutil.rmtree(self.scratch)

    def _step_under(self, path: Path) -> int:
        """As a user finds it: by name, through the reader."""
        try:
            reader = CheckpointReader(path)
        except Exception:
            # There may be nothing of the name, but nothing that looks like a checkpoint and is none.
            assert not is_checkpoint(path)
            assert not path.is_file()
            return 0
        with reader:
            step = reader.manifest.step
        assert_whole(path, self.training, step)
        if self.with_file:
            found = torch.load(path)
            assert found["loops"] == {"epoch": step}
            assert torch.equal(found["state_dict"]["buffer"], torch.arange(4) + step)
        return step

    @property
    def names(self) -> list[str]:
        """What is there of one checkpoint, and the live files."""
        return ["last.ckpt", *(["last.ckpt.links"] if self.with_file else []), "live"]

    def folder_of(self, name: str) -> Path:
        return self.root / (f"{name}.links" if self.with_file else name)

    def _story(self, cut: Cut) -> str:
        kept = dict(cut.kept)
        lines = []
        for number, op in enumerate(self.recorder.ops[: cut.at]):
            what = op.data.decode() if op.kind == "mark" else f"inode {op.inode} {op.at} {op.to}"
            lines.append(f"{number} {op.kind} {what}{'' if number in kept or op.kind in ('sync', 'mark') else ' LOST'}")
        return "\n".join(lines[-60:])


@pytest.fixture(params=[False, True], ids=["directory", "links"])
def run(disk: Path, request: pytest.FixtureRequest) -> Run:
    return Run(disk, with_file=request.param)


@pytest.mark.soak
@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "renames"])
def test_a_long_run_with_very_many_cuts(run: Run, can_exchange: bool) -> None:
    with run.recorder.recording(can_exchange=can_exchange):
        run.save("last.ckpt")
        for step in range(2, 8):
            run.save(f"step={step}.ckpt", copied=step % 3)
            run.save("last.ckpt")
            if step > 3:
                run.remove(f"step={step - 2}.ckpt")
    run.check(num_random=40)


def test_the_first_checkpoint_in_new_folders(run: Run) -> None:
    with run.recorder.recording():
        run.save("new/folder/c.ckpt", copied=1)
    assert run.check() > 3


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "renames"])
def test_saving_over_a_checkpoint(run: Run, can_exchange: bool) -> None:
    with run.recorder.recording(can_exchange=can_exchange):
        run.save("last.ckpt")
        begin = len(run.recorder.ops)
        run.save("last.ckpt", copied=1)
        run.save("last.ckpt")
    assert run.check(begin) > 3


def test_removing_and_training_on(run: Run) -> None:
    with run.recorder.recording():
        run.save("step=1.ckpt")
        begin = len(run.recorder.ops)
        for step in (2, 3):
            run.save(f"step={step}.ckpt")
            run.remove(f"step={step - 1}.ckpt")
            # The next generation is written into what was freed.
            run.training.advance()
    assert run.check(begin) > 3


def test_files_of_the_user_in_a_checkpoint_that_is_removed(run: Run) -> None:
    with run.recorder.recording():
        run.save("c.ckpt")
        fd = os.open(run.folder_of("c.ckpt") / "notes.txt", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, b"mine")
        os.fsync(fd)
        os.close(fd)
        begin = len(run.recorder.ops)
        run.remove("c.ckpt")
    assert run.check(begin) > 3
    assert (run.folder_of("c.ckpt") / "notes.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("with_file", [False, True], ids=["directory", "links"])
def test_killed_then_saved_again_then_cut(disk: Path, can_exchange: bool, with_file: bool) -> None:
    """The kernel still has what a killed process did; the next process must not build on it as if it were durable."""

    def play(die_at: int | None) -> tuple[Run, int]:
        shutil.rmtree(disk / "root")
        (disk / "root" / "live").mkdir(parents=True)
        run = Run(disk, with_file=with_file)
        with run.recorder.recording(can_exchange=can_exchange):
            run.save("last.ckpt")
            begin = len(run.recorder.ops)
            if die_at is None:
                run.save("last.ckpt")
                return run, begin
            with run.recorder.dying_at(begin + die_at):
                run.save("last.ckpt")
            begin = len(run.recorder.ops)
            run.save("last.ckpt")
        return run, begin

    whole, begin = play(None)
    num_ops = len(whole.recorder.ops) - begin
    moves = [n for n, op in enumerate(whole.recorder.ops[begin:]) if op.kind in ("rename", "exchange")]
    for die_at in sorted({*range(0, num_ops, 9), *range(moves[0], min(moves[0] + 12, num_ops))}):
        run, second = play(die_at)
        assert run.check(second, num_random=2, prefixes=False) > 0


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "renames"])
def test_a_sync_that_fails_then_cut(run: Run, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    """The disk refuses to make the new name durable: the old checkpoint is not given up for it."""
    with run.recorder.recording(can_exchange=can_exchange):
        run.save("last.ckpt")
        begin = len(run.recorder.ops)

        def fail(folder: Folder) -> None:
            if folder.path == str(run.root):
                raise OSError(errno.EIO, "Input/output error")
            sync(folder)

        sync = Folder.sync
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "sync", fail)
            with pytest.raises(CheckpointError, match="could not be saved"):
                run.save("last.ckpt")
        run.save("last.ckpt")
    assert run.check(begin) > 3
    # What the failure left is gone with the next save.
    assert sorted(os.listdir(run.root)) == run.names


def test_what_is_left_can_be_saved_over(run: Run, disk: Path) -> None:
    """Debris of any form is in nobody's way."""
    with run.recorder.recording():
        run.save("last.ckpt")
        begin = len(run.recorder.ops)
        run.save("last.ckpt")
    ops, rng = run.recorder.ops, random.Random(2)
    for at in range(begin, len(ops) + 1, 3):
        *_, cut = cuts(ops, at, rng, 1, prefixes=False)
        run.scratch.mkdir()
        write_tree(tree(after(ops, cut), ops), run.scratch)
        shutil.rmtree(run.scratch / "live")
        run.training.save(run.scratch / "last.ckpt", with_file=run.with_file)
        assert_whole(run.scratch / "last.ckpt", run.training, run.training.step)
        assert [*sorted(os.listdir(run.scratch)), "live"] == run.names
        shutil.rmtree(run.scratch)


# ------------------------------------------------------------------------------------------------- the recorder itself


def test_the_simulation_finds_a_missing_sync(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any one kind of sync taken out, some power cut does harm: the tests above would notice."""
    sync, root = Folder.sync, str(run.root)
    for owner, name, replacement in (
        (Folder, "sync", lambda folder: None if folder.path == root else sync(folder)),
        (Folder, "sync", lambda folder: sync(folder) if folder.path == root else None),
        (write, "_sync_sources", lambda *args: None),
    ):
        with monkeypatch.context() as patch, run.recorder.recording():
            patch.setattr(owner, name, replacement)
            begin = len(run.recorder.ops)
            run.save("last.ckpt")
            run.save("last.ckpt")
        with pytest.raises(AssertionError, match="after"):
            run.check(begin)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: open(path / "f", "w"),  # noqa: SIM115
        lambda path: os.mkfifo(path / "f"),
        lambda path: os.truncate(path / "f", 3),
        lambda path: os.chmod(path, 0o700),
        lambda path: os.sendfile(0, 0, 0, 1),
        lambda path: os.copy_file_range(0, 1, 1),
        lambda path: os.writev(1, [b""]),
        lambda path: os.mkdir(path.parent / "outside"),
        lambda path: shutil.copyfile(__file__, path / "f"),
    ],
)
def test_an_operation_the_recorder_does_not_know_is_an_error(run: Run, change: Callable[[Path], object]) -> None:
    with run.recorder.recording(), pytest.raises(UnknownOperation):
        change(run.root)


def test_the_code_calls_nothing_the_recorder_does_not_know() -> None:
    """Also where no test gets to."""
    known = READING | {name.removeprefix("_on_") for name in vars(Recorder)} | {"makedirs", "replace"}
    others = {("shutil", "rmtree"), ("fcntl", "flock"), ("ctypes", "CDLL"), ("ctypes", "get_errno")}
    for module in (write, directory, writer, folder, link_file, link_staging):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name):
                assert node.func.id not in ("open", "Path"), f"{module.__name__}:{node.lineno}"
            elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                holder, name = node.func.value.id, node.func.attr
                if holder == "os":
                    is_built_in = isinstance(getattr(os, name), types.BuiltinFunctionType)
                    assert name in known or not is_built_in, f"{module.__name__}:{node.lineno} calls os.{name}"
                elif holder in ("shutil", "fcntl", "ctypes", "mmap", "tempfile", "io", "pathlib"):
                    assert (holder, name) in others, f"{module.__name__}:{node.lineno} calls {holder}.{name}"


def test_a_killed_process_does_nothing_more(run: Run) -> None:
    with run.recorder.recording():
        with run.recorder.dying_at(len(run.recorder.ops) + 1):
            for number in range(5):
                os.mkdir(run.root / str(number))
        assert sorted(os.listdir(run.root)) == ["0", "live"]
        os.mkdir(run.root / "again")
