"""Runs killed with SIGKILL at any moment and resumed from the newest checkpoint, until they end as if never killed.

``python -m tests.soak.storm DIRECTORY SEED COUNT [SCENARIO ...]`` kills COUNT processes and prints a report as JSON; it
fails with what was lost. One process imports torch and Lightning, starts no thread, and forks a child per run, which is
in `watched`; so a run costs little.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_ssd.checkpoint.link_file import mark_of
from lightning_ssd.checkpoint.load import CheckpointReader
from tests.soak.watched import END, SCENARIOS, Hooks, Kill, Shared, be_child

DEADLINE_S = 60.0


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
            be_child(folder, scenario, Hooks(self._shared, kill, to_parent))
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
        for path in (folder / "saved").glob("[!.]*.ckpt"):
            loaded = torch.load(path, weights_only=True)
            if mark_of(str(path)) is None:
                continue
            with CheckpointReader(path) as reader:
                reader.verify()
                assert loaded["global_step"] == reader.manifest.step
                name = reader.parameter_names[0]
                assert torch.equal(loaded["state_dict"][name], reader.value(name))
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
