"""``lightning-ssd clean --yes`` in a loop, beside runs, savers, removers, copies, exports and trial saves that live.

``python -m tests.soak.cleaning DIRECTORY ROUNDS [WORK ...]`` runs one process for each kind of work, all in the same
folders, and one that is killed again and again, so that there is something to clean. It fails if any of the living
ends, or if what it made is not there and whole; and if anything dead is left at the end. Prints what was done as JSON.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from lightning_ssd.checkpoint.directory import remove
from lightning_ssd.cli.main import main as command_line
from lightning_ssd.convert.copy import copy_checkpoint
from lightning_ssd.convert.export import consolidate, to_safetensors
from lightning_ssd.io.file import File
from lightning_ssd.saving.probe_save import probe_save
from lightning_ssd.store.run_directory import RunDirectory, warn_of_dead_runs
from tests.checkpoint.support import Training, assert_whole

SHAPES = {"a": {"a.weight": (50, 7)}, "b": {"b.bias": (5,)}}
NAMES = ("store", "saved")


def training_in(folder: Path, name: str) -> Training:
    live = folder / f"live-{name}-{os.getpid()}"
    live.mkdir()
    training = Training(live, shapes=SHAPES)
    training.advance()
    return training


class Work:
    """One round of each kind of work; each leaves nothing behind but what it replaces in the next."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._saved = folder / "saved"
        self._name = name
        self._training = training_in(folder, name)
        self._numbers = itertools.count()
        if name in ("copy", "export"):
            self._training.save(self._saved / f"{name}.ckpt")

    def run(self) -> None:
        """A run that begins, makes files, and ends."""
        warn_of_dead_runs(str(self._folder / "store"))
        run = RunDirectory(str(self._folder / "store"))
        paths = [os.path.join(run.path, f"{number}.safetensors") for number in range(3)]
        for path in paths:
            File.create(path, 4096, direct=False, folder=run.folder).close()
        assert sorted(os.listdir(run.path)) == ["0.safetensors", "1.safetensors", "2.safetensors", "lock"]
        run.close(remove=True)
        assert not os.path.exists(run.path)

    def save(self) -> None:
        """Save over the last one."""
        self._next()
        self._training.save(self._saved / f"{self._name}-last.ckpt")
        assert_whole(self._saved / f"{self._name}-last.ckpt", self._training, self._training.step)

    def remove(self) -> None:
        """Keep the last two."""
        self._next()
        self._training.save(self._saved / f"{self._name}-{self._training.step}.ckpt")
        assert_whole(self._saved / f"{self._name}-{self._training.step}.ckpt", self._training, self._training.step)
        if self._training.step > 3:
            remove(self._saved / f"{self._name}-{self._training.step - 2}.ckpt")

    def copy(self) -> None:
        """Copy and remove the copy."""
        target = self._saved / "copies" / "copy.ckpt"
        copy_checkpoint(self._saved / "copy.ckpt", target)
        assert_whole(target, self._training, 1)
        remove(target)

    def export(self) -> None:
        """Write both forms."""
        consolidate(self._saved / "export.ckpt", self._saved / "export.pt", overwrite=True)
        target = self._saved / f"export-{next(self._numbers)}"
        to_safetensors(self._saved / "export.ckpt", target)
        assert (target / "model.safetensors").exists()
        shutil.rmtree(target)

    def probe_save(self) -> None:
        """What every run does before its first step."""
        assert probe_save(str(self._saved), [str(self._training.store)]) == 1

    def train(self) -> None:
        """The whole of it: a fit that saves at every step and keeps two."""
        from tests.soak.watched import Hooks, Shared, train

        folder = self._folder / f"fit-{next(self._numbers)}"
        (folder / "saved").mkdir(parents=True)
        train(folder, "plain", Hooks(Shared(), None, -1))
        assert len(list((folder / "saved").glob("[!.]*.ckpt"))) == 2
        shutil.rmtree(folder)

    def _next(self) -> None:
        before = [file.source for file in self._training.files]
        self._training.advance()
        for source in before:
            os.unlink(source)


def mortal(folder: Path) -> None:
    """What is killed: begins runs, saves, copies and exports until then."""
    work = Work(folder, f"mortal-{os.getpid()}")
    source = folder / "saved" / "copy.ckpt"
    while True:
        run = RunDirectory(str(folder / "store"))
        File.create(os.path.join(run.path, "0.safetensors"), 4096, direct=False, folder=run.folder).close()
        work.save()
        remove(folder / "saved" / f"mortal-{os.getpid()}-last.ckpt")
        if source.exists():
            copy_checkpoint(source, folder / "saved" / f"mortal-{os.getpid()}.ckpt")
            consolidate(source, folder / "saved" / f"mortal-{os.getpid()}.pt")
            remove(folder / "saved" / f"mortal-{os.getpid()}.ckpt")
            os.unlink(folder / "saved" / f"mortal-{os.getpid()}.pt")
        run.close(remove=True)


def forked(action: Callable[[], None], errors: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = open(errors, "a")  # noqa: SIM115
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def keep_on(folder: Path, name: str) -> None:
    work = Work(folder, name)
    action = getattr(work, name.partition("-")[0])
    while not (folder / "stop").exists():
        action()
        with open(folder / f"count-{name}", "a") as count:
            count.write(".")


class Cleaning:
    """The living, the dying, and who cleans up."""

    def __init__(self, folder: Path, works: tuple[str, ...]) -> None:
        self._folder = folder
        for name in NAMES:
            (folder / name).mkdir()
        self._kept = RunDirectory(str(folder / "store"), keep=True)
        self._kept.close(remove=False)
        self._living = {forked(lambda n=name: keep_on(folder, n), folder / "errors"): name for name in works}
        self.removed: Counter[str] = Counter()
        self.kills = 0

    def run(self, rounds: int) -> None:
        rng = random.Random(1)
        victim, dies_at_s = 0, 0.0
        try:
            for _ in range(rounds):
                if time.monotonic() >= dies_at_s:
                    self._kill(victim)
                    victim = forked(lambda: mortal(self._folder), self._folder / "errors-of-the-dead")
                    dies_at_s = time.monotonic() + rng.uniform(0.02, 0.3)
                self._clean()
                self._assert_living()
        finally:
            self._kill(victim)
            (self._folder / "stop").touch()
            codes = {name: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, name in self._living.items()}
        assert not any(codes.values()), f"{codes}: {(self._folder / 'errors').read_text()[-4000:]}"
        self._clean()
        # One that died before it had its name may still be being made, for all that others know; it stays for an hour.
        left = {name for name in os.listdir(self._folder / "store") if not name.startswith(".new-")}
        assert left == {os.path.basename(self._kept.path)}, f"dead runs were left: {left}"
        saves = list((self._folder / "saved").rglob(".*"))
        assert not saves, f"dead saves were left: {saves}"

    def counts(self) -> dict[str, int]:
        """How often each work was done."""
        return {path.name.partition("-")[2]: path.stat().st_size for path in self._folder.glob("count-*")}

    def _clean(self) -> None:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = command_line(["clean", str(self._folder), "--yes", "--json"])
        assert code == 0, out.getvalue() + err.getvalue()
        found: list[dict[str, Any]] = json.loads(out.getvalue())
        self.removed.update(find["what"] for find in found if find["removed"])

    def _kill(self, victim: int) -> None:
        if victim:
            os.kill(victim, signal.SIGKILL)
            status = os.waitpid(victim, 0)[1]
            assert os.WIFSIGNALED(status), (self._folder / "errors-of-the-dead").read_text()[-4000:]
            self.kills += 1

    def _assert_living(self) -> None:
        for child, name in self._living.items():
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            assert ended is None, f"{name} ended: {(self._folder / 'errors').read_text()[-4000:]}"


def main(folder: Path, rounds: int, works: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    begin_s = time.monotonic()
    cleaning = Cleaning(folder, works)
    cleaning.run(rounds)
    facts = {"benchmark": "cleaning", "rounds": rounds, "seconds": time.monotonic() - begin_s, "kills": cleaning.kills}
    print(json.dumps(facts | {"removed": dict(cleaning.removed), "done": cleaning.counts(), "ended": 0, "lost": 0}))


WORKS = ("run", "save", "remove", "copy", "export", "probe_save")

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), tuple(sys.argv[3:]) or WORKS)
