"""Each fault at each place: the run ends with one clear error or is not disturbed, and nothing that was saved is lost.

``LIGHTNING_SSD_FAULTS_TABLE=docs/results/faults.md python -m pytest -q tests/faults/test_sites.py -m ''`` writes what
came of each into a table.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ssd.checkpoint.link_file import mark_of
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.convert.export import consolidate
from lightning_ssd.errors import CheckpointError, CorruptionError, SSDOffloadError
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.memory.pool import Pool
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.faults.sites import SITES, Injector, Site
from tests.faults.support import finish_backward, small_gpt
from tests.helpers.activations import Spilling, spilling  # noqa: F401
from tests.helpers.io_engines import engine_or_skip
from tests.helpers.training import train

STEPS = 4
LIMIT_S = 30.0  # of a run of a second; a wait that never ends would take the engine's deadline of 120 s
ENGINES = ("uring", "posix")
TABLE = os.environ.get("LIGHTNING_SSD_FAULTS_TABLE")


def _cases() -> Iterator[Any]:
    """All of them; in a normal run the first fault of each site, and for the next site the next one."""
    for number, site in enumerate(SITES):
        for index, fault in enumerate(site.faults):
            for engine in ENGINES if site.by_engine else ENGINES[:1]:
                is_quick = index == number % len(site.faults) and engine == ENGINES[number % 2 if site.by_engine else 0]
                marks = () if is_quick else (pytest.mark.soak,)
                yield pytest.param(site, fault, engine, marks=marks, id=f"{site.name}: {fault}, {engine}")


@dataclass(frozen=True)
class Row:
    """What came of one fault."""

    site: Site
    fault: str
    engine: str
    outcome: str


class Outcome(NamedTuple):
    """What a run computed, without what computed it."""

    losses: list[float]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    found: list[Row] = []
    yield found
    if TABLE:
        Path(TABLE).write_text(table(found))


@pytest.fixture(scope="module")
def expected() -> dict[str, Outcome]:
    """Undisturbed runs, by settings of the Trainer."""
    return {}


class Armed(SSDOffloadStrategy):
    """Arms the injector while it does what the site belongs to."""

    injector: Injector | None = None
    when = ""
    num_saved = 0

    def setup(self, trainer: pl.Trainer) -> None:
        if self.injector is not None and self.when in ("place", "train"):
            self.injector.is_armed = True
        super().setup(trainer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        before = self.injector is not None and self.injector.is_armed
        if self.injector is not None:
            self.injector.is_armed = self.when in ("save", "copy", "flush") and self.num_saved == STEPS - 2
        super().save_checkpoint(checkpoint, filepath, storage_options)
        self.num_saved += 1
        if self.injector is not None:
            self.injector.is_armed = before

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.injector is not None and self.when == "remove":
            self.injector.is_armed = True
        super().remove_checkpoint(filepath)
        if self.injector is not None and self.when == "remove":
            self.injector.is_armed = False


def run(folder: Path, site: Site, engine: str, injector: Injector | None, **kwargs: Any) -> Outcome:
    """Four steps, each saved, two checkpoints kept."""
    settings: dict[str, Any] = {"host_memory": "min", "min_unit_numel": 0, "verify_reads": True} | site.settings
    strategy = Armed(io=IOOptions(engine=engine), **settings)
    strategy.injector, strategy.when = injector, site.when
    saver = ModelCheckpoint(
        folder / "saved", filename="{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max"
    )
    options: dict[str, Any] = {"max_steps": STEPS, "enable_checkpointing": True, "callbacks": [saver]}
    result = train(folder, small_gpt, strategy, **(options | site.trainer | kwargs))
    return Outcome(result.losses, result.weights)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Pool]:
    """Every pool that is made."""
    made: list[Pool] = []
    init = Pool.__init__

    def recording(self: Pool, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Pool, "__init__", recording)
    return made


@pytest.mark.parametrize(("site", "fault", "engine"), list(_cases()))
def test_a_fault_ends_the_run_clearly_or_does_nothing(
    tmp_path: Path,
    site: Site,
    fault: str,
    engine: str,
    rows: list[Row],
    expected: dict[str, Outcome],
    pools: list[Pool],
    spilling: Spilling,  # noqa: F811
    request: pytest.FixtureRequest,
) -> None:
    engine_or_skip(engine)
    if site.keeps_inputs:
        spilling(budget=0, verify=True)
    key = str(site.trainer)
    if key not in expected:
        expected[key] = run(tmp_path / "whole", site, engine, None)
    injector = Injector(site, fault, engine)
    begin_s = time.monotonic()
    error: BaseException | None = None
    result: Outcome | None = None
    with injector.installed():
        try:
            result = _play(tmp_path, site, engine, injector)
        except (SSDOffloadError, OSError) as raised:
            error = raised
            # Without its frames, which hold the run.
            error = raised.with_traceback(None)
            error.__cause__ = error.__context__ = None
            finish_backward()
    took_s = time.monotonic() - begin_s
    assert injector.hits == 1, f"the run did not get to {site.name}"
    assert took_s < LIMIT_S
    outcome = _judge(tmp_path, site, fault, error, result, expected[key])
    # In a normal run, going on is left to every third: the files have been verified.
    if request.node.get_closest_marker("soak") or SITES.index(site) % 3 == 0:
        _goes_on(tmp_path, site, engine, expected[key])
    held = [buffer.owner for pool in pools for buffer in pool._lent.values()]
    assert not held, f"buffers were not given back: {held}"
    rows.append(Row(site, fault, engine, outcome))


def _play(folder: Path, site: Site, engine: str, injector: Injector) -> Outcome:
    if site.when in ("load", "export"):
        result = run(folder, site, engine, None)
        injector.is_armed = True
        if site.when == "load":
            return run(folder, site, engine, injector, ckpt_path=str(folder / "saved" / "step=4.ckpt"))
        consolidate(folder / "saved" / "step=4.ckpt", folder / "export" / "out.ckpt")
        return result
    return run(folder, site, engine, injector)


def _judge(
    folder: Path, site: Site, fault: str, error: BaseException | None, result: Outcome | None, whole: Outcome
) -> str:
    """Whether what was saved is there; what the table says."""
    damaged = _damaged(folder / "saved")
    if error is None:
        assert result is not None
        if site.when not in ("load", "export"):
            _assert_equal(whole, result)
        if not damaged:
            return "no effect: the same losses and weights"
    else:
        assert isinstance(error, SSDOffloadError), f"{type(error).__name__}: {error}"
        assert len(str(error)) > 20
    if fault in ("torn in silence", "bit flip"):
        # A disk that lies can damage what is saved while it lies; that is found, and what was saved before is whole.
        assert error is not None or damaged, "wrong bytes went unnoticed"
    else:
        assert not damaged, damaged
    if (folder / "export").exists() and error is not None:
        assert not list((folder / "export").iterdir())
    said = f"{type(error).__name__}: {_plain(str(error), folder)}" if error is not None else "the run goes on"
    found = "; ".join(_plain(text, folder) for text in damaged.values())
    return said + (f"; found when it is read: {found}" if found else "")


def _damaged(saved: Path) -> dict[str, str]:
    """Checkpoints of which a byte is wrong, and how that is told. Each has a manifest, and all that it names."""
    found: dict[str, str] = {}
    for path in sorted(saved.glob("[!.]*.ckpt")):
        try:
            assert mark_of(str(path)) is not None, f"{path} has a name and is no checkpoint"
            torch.load(path)
            with CheckpointReader(path) as reader:
                reader.verify()
        except (CheckpointError, CorruptionError) as error:
            found[path.name] = f"{type(error).__name__}: {error}"
    return found


def _goes_on(folder: Path, site: Site, engine: str, whole: Outcome) -> None:
    """From the newest checkpoint that verifies, or from the start, to the same end."""
    damaged = _damaged(folder / "saved")
    good = sorted(path for path in (folder / "saved").glob("[!.]*.ckpt") if path.name not in damaged)
    if not good:
        return
    plain = Site(site.name, "", ("read",), "", (), settings=site.settings, trainer=site.trainer)
    rest = run(folder, plain, engine, None, ckpt_path=str(good[-1]))
    step = int(good[-1].stem.removeprefix("step="))
    _assert_equal(Outcome(whole.losses[step:], whole.weights), rest)


def _assert_equal(a: Outcome, b: Outcome) -> None:
    assert a.losses == b.losses
    assert not [name for name in a.weights if not torch.equal(a.weights[name], b.weights[name])]


def _plain(text: str, folder: Path) -> str:
    """Without what differs from run to run."""
    text = text.replace(str(folder), "")
    text = re.sub(r"ssd-run-[\d-]+", "ssd-run", text)
    text = re.sub(r"\.(tmp|export)-\d+-[0-9a-f]{8}", r".\1", text)
    text = re.sub(r"/\d{8}-", "/", text)
    text = re.sub(r"checksum [0-9a-f]{8}, not '?[0-9a-f]{8}'?", "checksum ..., not ...", text)
    return re.sub(r"\([\d.]+ [KMGT]iB free\)", "(... free)", text)


def table(rows: list[Row]) -> str:
    """Markdown: a row per site and fault, engines of the same outcome together."""
    merged: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        merged.setdefault((row.site.name, row.fault, row.outcome), []).append(row)
    lines = []
    for (name, fault, outcome), same in merged.items():
        engines = ", ".join(row.engine for row in same) if same[0].site.by_engine else "any"
        text = outcome.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {fault} | {engines} | {text} |")
    return HEAD + "\n".join(lines) + "\n"


HEAD = f"""# Faults

What comes of each fault at each place where bytes or names go to a disk or come from one. Written by
`LIGHTNING_SSD_FAULTS_TABLE=docs/results/faults.md python -m pytest -q tests/faults/test_sites.py -m ''`, which also
checks, for every row: the run ends within {LIMIT_S:g} s; no thread, file descriptor, child process or buffer is left;
every checkpoint that has a name verifies, or is found to be damaged where the disk lied; and from the newest good one
the run goes on to the same losses and weights, to the bit. Reads are verified (`verify_reads=True`).

| where | fault | engine | what comes of it |
| --- | --- | --- | --- |
"""
