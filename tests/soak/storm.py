"""Runs killed with SIGKILL at any moment and resumed from the newest checkpoint, until they end as if never killed.

``python -m tests.soak.storm DIRECTORY SEED COUNT [SCENARIO ...]`` kills COUNT processes and prints a report as JSON; it
fails with what was lost. One process imports torch and Lightning, starts no thread, and forks a child per run; so a run
costs little.

A child tells its phase through shared memory, so that each kill is counted where it hit. It is killed
- by time: at a random moment of its life;
- in a phase: a random time after the nth entry into it;
- at an operation: before the nth disk transfer of one sort, or the nth change of a name while it saves, removes,
  exports or spills.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ssd.checkpoint.directory import is_checkpoint
from lightning_ssd.checkpoint.export import consolidate
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.io.faulty import FaultyEngine, Operation
from lightning_ssd.io.select import make_engine
from lightning_ssd.strategy import session as session_module
from lightning_ssd.strategy.lightning_face import SSDOffloadStrategy
from lightning_ssd.trace import Trace
from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, make_trainer

END = 6
DEADLINE_S = 60.0

PHASES = ("start", "resume", "forward", "backward", "step", "checkpoint", "remove", "export", "between", "end")
"""What the main thread does. Updates and spills are counted beside it: they have threads of their own."""

SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"gradient_clip_val": 0.5},
    "accumulate, clip": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-true, accumulate": {"precision": "bf16-true", "accumulate_grad_batches": 2},
    "in memory, clip": {"gradient_clip_val": 0.5},
}

STRATEGY: dict[str, dict[str, Any]] = {"in memory, clip": {"host_memory": "64MiB"}}
"""Settings other than the smallest memory. With more, units stay in memory; a checkpoint has them too."""


# --------------------------------------------------------------------------------------------------------- the child


@dataclass(frozen=True)
class Kill:
    """When a child dies. ``how``: time, phase, transfer, name. Transfers are named ``write exp_avg``, and the like."""

    how: str
    where: str = ""
    nth: int = 0
    delay_s: float = 0.0


class Shared:
    """What a child tells the parent, readable after its death."""

    _FIELDS = (*PHASES, "update", "spill")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.reset()

    def reset(self) -> None:
        self._memory[: len(self._FIELDS)] = bytes(len(self._FIELDS))

    def add(self, name: str, change: int) -> None:
        at = self._FIELDS.index(name)
        self._memory[at] = max(0, min(255, self._memory[at] + change))

    def set_phase(self, name: str) -> None:
        for phase in PHASES:
            self._memory[self._FIELDS.index(phase)] = phase == name

    def set_spill(self, is_spill: bool) -> None:
        """Whether the last operation on the disk was of a spilled gradient."""
        self._memory[self._FIELDS.index("spill")] = is_spill

    def active(self) -> list[str]:
        return [name for at, name in enumerate(self._FIELDS) if self._memory[at]]


class Hooks:
    """Follows what the child does, and kills it where it was told to."""

    def __init__(self, shared: Shared, kill: Kill | None, to_parent: int) -> None:
        self._shared = shared
        self._kill = kill
        self._to_parent = to_parent
        self._phases: list[str] = []
        self._counts: Counter[str] = Counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        self._shared.set_phase(name)
        self.reached("phase", name)
        try:
            yield
        finally:
            self._phases.pop()
            self._shared.set_phase(self._phases[-1] if self._phases else "between")
            self._shared.set_spill(False)

    def reached(self, how: str, where: str) -> None:
        kill = self._kill
        if kill is None or kill.how != how or kill.where != where:
            return
        self._counts[where] += 1
        if self._counts[where] == kill.nth:
            if kill.delay_s:
                os.write(self._to_parent, b"k")  # the parent kills after the delay
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """In a child that will die or end: nothing is undone."""

        def watched(options: Any) -> Any:
            return FaultyEngine(make_engine(options), self._on_transfer, deadline_s=options.deadline_s)

        session_module.make_engine = watched
        mark = Trace.mark

        def marked(trace: Trace, name: str, what: str) -> None:
            if name in ("update", "updated"):
                self._shared.add("update", 1 if name == "update" else -1)
                self.reached("phase", name)
            mark(trace, name, what)

        Trace.mark = marked  # type: ignore[method-assign]
        for name in ("link", "rename", "unlink", "rmdir", "mkdir", "fsync", "replace"):
            setattr(os, name, self._on_name(getattr(os, name)))

    def _on_transfer(self, operation: Operation) -> None:
        name = os.path.basename(operation.path)
        kind = next((kind for kind in ("exp_avg_sq", "exp_avg", "master", "grad", "param") if kind in name), "other")
        self._shared.set_spill(kind == "grad")
        self.reached("transfer", f"{'write' if operation.is_write else 'read'} {kind}")

    def _on_name(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._phases and self._phases[-1] in ("checkpoint", "remove", "export"):
                self.reached("name", self._phases[-1])
            if args and isinstance(args[0], str) and "grad" in os.path.basename(args[0]):
                self._shared.set_spill(True)
                self.reached("name", "spill")
            return function(*args, **kwargs)

        return run


class Watched(Module):
    """Tells its phases, and writes each loss where it outlives the process."""

    def __init__(self, hooks: Hooks, log_fd: int) -> None:
        super().__init__(GPT(width=16, layers=2, tie=True, dropout=0.1))
        self._hooks = hooks
        self._log_fd = log_fd

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        with self._hooks.phase("forward"):
            loss = super().training_step(batch, batch_idx)
        os.write(self._log_fd, f"{self.global_step} {batch_idx} {float(loss.item()).hex()}\n".encode())
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self._hooks.phase("backward"):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with self._hooks.phase("step"):
            super().optimizer_step(*args, **kwargs)


class WatchedStrategy(SSDOffloadStrategy):
    """Tells when it saves, loads and removes."""

    hooks: Hooks

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.hooks.phase("checkpoint"):
            super().save_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.hooks.phase("remove"):
            super().remove_checkpoint(*args, **kwargs)


class Exporter(pl.Callback):
    """Exports the newest checkpoint every other step."""

    def __init__(self, hooks: Hooks, folder: Path) -> None:
        self._hooks = hooks
        self._folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        newest = newest_checkpoint(self._folder / "saved")
        if trainer.global_step % 2 == 0 and newest is not None:
            with self._hooks.phase("export"):
                consolidate(newest, self._folder / "export.ckpt", overwrite=True)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._hooks.phase("between").__enter__()


def train(folder: Path, scenario: str, hooks: Hooks) -> None:
    """From the newest checkpoint, if there is one, to step `END`; leaves the digest of all weights."""
    newest = newest_checkpoint(folder / "saved")
    log_fd = os.open(folder / "losses", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with hooks.phase("start" if newest is None else "resume"):
        pl.seed_everything(1 if newest is None else 99, verbose=False)
        settings = {"host_memory": "min", "min_unit_numel": 0} | STRATEGY.get(scenario, {})
        strategy = WatchedStrategy(nvme_path=str(folder / "store"), **settings)
        strategy.hooks = hooks
        module = Watched(hooks, log_fd)
        saver = ModelCheckpoint(
            folder / "saved", filename="{step}", monitor="step", mode="max", every_n_train_steps=1, save_top_k=2
        )
        trainer = make_trainer(
            folder, strategy, max_steps=END, callbacks=[saver, Exporter(hooks, folder)], enable_checkpointing=True,
            **SCENARIOS[scenario],
        )  # fmt: skip
        trainer.fit(module, DataLoader(Tokens(40), batch_size=4, shuffle=True), ckpt_path=newest)
    with hooks.phase("end"):
        digest = digest_of(module.state_dict())
        (folder / "digest.tmp").write_text(digest)
        os.replace(folder / "digest.tmp", folder / "digest")
        strategy.session.close()


def digest_of(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def newest_checkpoint(folder: Path) -> Path | None:
    """The one of the latest step; a name that is not hidden and has a manifest counts as a checkpoint."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("[!.]*"):
        if is_checkpoint(path):
            with CheckpointReader(path) as reader:
                found.append((reader.manifest.step, path))
    return max(found)[1] if found else None


# --------------------------------------------------------------------------------------------------------- the parent


@dataclass
class Report:
    """What the storm did.

    Attributes:
        kills: Processes killed.
        finished: Runs that were resumed to the end and compared.
        hit: Kills while each phase was under way.
        ways: Kills of each kind.
        survived: Children that ended before their kill was due; not counted in ``kills``.
        seconds: How long it took.
    """

    kills: int = 0
    finished: int = 0
    hit: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    survived: int = 0
    seconds: float = 0.0


class Storm:
    """Kills children of this process, and holds what comes of it to the uninterrupted run."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._rng = random.Random(seed)
        self._shared = Shared()
        self._num_runs = 0
        self._expected: dict[str, tuple[str, dict[str, str], float]] = {}
        self.report = Report()

    def rage(self, count: int, scenarios: Sequence[str]) -> None:
        """Kill until ``count`` have been killed and every run has come to its end."""
        begin_s = time.monotonic()
        while self.report.kills < count:
            for scenario in scenarios:
                if self.report.kills < count:
                    self._one_run(scenario, min(self._rng.choice((1, 2, 2, 3, 4)), count - self.report.kills))
        self.report.seconds = time.monotonic() - begin_s

    def _one_run(self, scenario: str, num_kills: int) -> None:
        """Kill a run, resume it and kill it again, ``num_kills`` times; then let it end."""
        folder = self._new_folder()
        history: list[Any] = []
        digest, losses, usual_s = self._reference(scenario)
        try:
            while num_kills and not (folder / "digest").exists():
                kill = self._draw(usual_s, "clip" in scenario)
                was_killed = self._child(folder, scenario, kill)
                history.append((kill, was_killed, self._shared.active()))
                if was_killed:
                    num_kills -= 1
                    self._count(kill)
                self._check(folder)
            if not (folder / "digest").exists():
                assert not self._child(folder, scenario, None), "killed by nobody"
            assert (folder / "digest").read_text() == digest, "the final weights differ"
            found = read_losses(folder)
            assert found == losses, f"losses differ: {found} instead of {losses}"
        except BaseException as error:
            raise AssertionError(f"{scenario}, {folder}: {error}; history: {history}") from error
        self.report.finished += 1
        shutil.rmtree(folder)

    def _reference(self, scenario: str) -> tuple[str, dict[str, str], float]:
        """Final digest, losses and seconds of the uninterrupted run."""
        if scenario not in self._expected:
            folder = self._new_folder()
            begin_s = time.monotonic()
            assert not self._child(folder, scenario, None)
            usual_s = time.monotonic() - begin_s
            losses = read_losses(folder)
            assert len({step for step, _ in map(str.split, losses)}) == END
            self._check(folder)
            self._expected[scenario] = (folder / "digest").read_text(), losses, usual_s
            shutil.rmtree(folder)
        return self._expected[scenario]

    def _draw(self, usual_s: float, is_clipped: bool) -> Kill:
        rng = self._rng
        how = rng.choices(("time", "phase", "transfer", "name"), (3, 5, 2, 3))[0]
        if how == "time":
            return Kill("time", delay_s=rng.uniform(0.0, usual_s))
        if how == "phase":
            # Each of them is entered this often at least.
            entries = {"forward": 6, "backward": 6, "step": 6, "checkpoint": 6, "remove": 4, "export": 3, "update": 18}
            where = rng.choice([*entries, "resume"])
            nth = rng.randint(1, max(1, entries.get(where, 1) // rng.choice((1, 2, 3))))
            return Kill("phase", where, nth, rng.choice((0.0, rng.uniform(1e-5, 2e-2))))
        if how == "transfer":
            sorts = ["read param", "write param", "read exp_avg", "write exp_avg", "write exp_avg_sq"]
            sorts += ["read grad", "write grad"] * is_clipped
            return Kill("transfer", rng.choice(sorts), rng.randint(1, 30))
        where = rng.choice(["checkpoint", "remove", "export"] + ["spill"] * (4 * is_clipped))
        return Kill("name", where, rng.randint(1, {"checkpoint": 40, "spill": 5}.get(where, 12)))

    def _child(self, folder: Path, scenario: str, kill: Kill | None) -> bool:
        """Run a child; whether it was killed, rather than ended by itself."""
        assert len(os.listdir("/proc/self/task")) == 1, "a thread was started before the fork"
        self._shared.reset()
        from_child, to_parent = os.pipe()
        child = os.fork()
        if child == 0:
            _be_child(folder, scenario, Hooks(self._shared, kill, to_parent))
        os.close(to_parent)
        try:
            return self._wait(child, from_child, kill)
        finally:
            os.close(from_child)

    def _wait(self, child: int, from_child: int, kill: Kill | None) -> bool:
        # Either of both ends it: the word of the child, or its own end, which closes the pipe.
        is_timed = kill is not None and kill.how == "time"
        is_told = not is_timed and bool(select([from_child], [], [], DEADLINE_S)[0]) and bool(os.read(from_child, 1))
        if kill is not None and (is_timed or is_told):
            time.sleep(kill.delay_s)
            os.kill(child, signal.SIGKILL)
        status = _wait_for(child)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, f"the child died of signal {os.WTERMSIG(status)}"
            return True
        assert os.WEXITSTATUS(status) == 0, "the child failed: see its file 'errors'"
        self.report.survived += kill is not None
        return False

    def _count(self, kill: Kill) -> None:
        self.report.kills += 1
        self.report.ways[kill.how] += 1
        for name in self._shared.active() or ["start"]:
            self.report.hit[name] += 1

    def _check(self, folder: Path) -> None:
        """Whatever has a name is whole; losses so far are those of the uninterrupted run."""
        for path in (folder / "saved").glob("[!.]*"):
            assert is_checkpoint(path), f"{path} is no checkpoint"
            with CheckpointReader(path) as reader:
                reader.verify()
        if (folder / "export.ckpt").exists():
            loaded = torch.load(folder / "export.ckpt", mmap=True, weights_only=True)
            assert loaded["state_dict"]
        shutil.rmtree(folder / "store", ignore_errors=True)  # the dead run's, as `lightning-ssd clean` would

    def _new_folder(self) -> Path:
        self._num_runs += 1
        folder = self._directory / f"run-{self._num_runs}"
        (folder / "saved").mkdir(parents=True)
        return folder


def read_losses(folder: Path) -> dict[str, str]:
    """Step and batch -> loss; a step that ran twice must have had the same one."""
    found: dict[str, str] = {}
    for line in (folder / "losses").read_text().splitlines():
        place, _, loss = line.rpartition(" ")
        assert found.setdefault(place, loss) == loss, f"step and batch {place}: {loss}, before {found[place]}"
    return found


def _be_child(folder: Path, scenario: str, hooks: Hooks) -> None:
    code = 1
    try:
        errors = os.open(folder / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        warnings.simplefilter("ignore")
        hooks.install()
        train(folder, scenario, hooks)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _wait_for(child: int) -> int:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the child did not end in {DEADLINE_S} s")


def main(directory: Path, seed: int, count: int, scenarios: Sequence[str]) -> None:
    torch.set_num_threads(1)
    storm = Storm(directory, seed)
    storm.rage(count, scenarios)
    report = vars(storm.report) | {"hit": dict(storm.report.hit), "ways": dict(storm.report.ways)}
    settings = {"benchmark": "kill_storm", "seed": seed, "scenarios": list(scenarios), "steps": END}
    facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": pl.__version__}
    print(json.dumps(settings | facts | versions | report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] or list(SCENARIOS))
