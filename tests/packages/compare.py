"""Runs the jobs of one module in its package's environment: ``python -m tests.packages.compare MODULE [MODEL ...]``.

Each job is trained by plain Lightning twice, which shows what repeats at all, and under the strategy in the least
memory and with its defaults. A line of JSON for each job and setting says how far it is from the first plain run: 0.0
where all bits are equal.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.packages.job import EPOCHS, Job, Train, Trained
from tests.packages.notes import Notes, notes_of

COMPARED = ("losses", "logged", "weights", "predictions", "reloaded", "resumed", "resumed_by_plain")
SETTINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain again": None,
    "least memory": {"host_memory": "min", "min_unit_numel": 0, "update": "torch"},
    "default": {},
}


@dataclass
class Run:
    """One training, as flat arrays by name."""

    losses: list[float]
    logged: dict[str, float]
    weights: dict[str, np.ndarray]
    predictions: dict[str, np.ndarray]
    reloaded: dict[str, np.ndarray]
    seconds: float
    resumed: Run | None = None
    resumed_by_plain: Run | None = None


def arrays(value: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The numbers in a nesting of tensors, arrays, frames and containers, with a name for each."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        yield name, (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()
    elif hasattr(value, "to_numpy"):
        numbers = value.select_dtypes("number") if hasattr(value, "select_dtypes") else value
        yield name, np.asarray(numbers.to_numpy())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from arrays(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)) and not all(isinstance(item, (int, float)) for item in value):
        for key, item in enumerate(value):
            yield from arrays(item, f"{name}.{key}")
    elif value is not None and not isinstance(value, str):
        yield name, np.asarray(value)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest difference; 0.0 if all bits are equal, inf if names, shapes or places of NaN differ."""
    if one.keys() != other.keys():
        return math.inf
    largest = 0.0
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        if a.tobytes() == b.tobytes():
            continue
        if a.dtype == object or not np.array_equal(np.isnan(a), np.isnan(b)):
            return math.inf
        largest = max(largest, float(np.nanmax(np.abs(a.astype(np.float64) - b.astype(np.float64)), initial=5e-324)))
    return largest


def seed() -> None:
    """The same generators for each run; one thread where the machine's load would choose."""
    import random

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def strategy(module: Any, setting: str) -> Any:
    """The value for `Trainer(strategy=...)`: by name where the package's configuration takes only plain values."""
    options = SETTINGS[setting]
    if options is None:
        return "auto"
    if not options:
        return "ssd_offload"
    name = "for_pytorch_lightning" if module.NAMESPACE == "pytorch_lightning" else "for_lightning"
    ours = importlib.import_module(f"lightning_ssd.strategy.{name}").SSDOffloadStrategy
    if not getattr(module, "NAMES_ONLY", False):
        return ours(**options)
    registry = importlib.import_module(f"{module.NAMESPACE}.strategies").StrategyRegistry
    registry.register("ssd_least_memory", ours, override=True, **options)
    return "ssd_least_memory"


def run(train: Train, module: Any, setting: str, folder: Path, epochs: int = EPOCHS) -> Run:
    """Train once, and note what came of it."""
    seed()
    Notes.clear()
    trainer = {
        "strategy": strategy(module, setting),
        "callbacks": [notes_of(module.NAMESPACE)],
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(folder),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    start = time.perf_counter()
    trained: Trained = train(trainer, folder, epochs)
    return Run(
        list(Notes.losses),
        dict(Notes.logged),
        dict(arrays(trained.module.state_dict())),
        dict(arrays(trained.predictions)),
        dict(arrays(trained.reloaded)),
        time.perf_counter() - start,
    )


def run_with_resume(job: Job, module: Any, setting: str, folder: Path) -> Run:
    """Train; go on from copies of what the run left, under the same setting and under plain Lightning."""
    done = run(job.train, module, setting, folder)
    if job.resume is not None:
        copies = [folder.with_name(f"{folder.name}, {what}") for what in ("resumed", "resumed by plain")]
        for copy in copies:
            shutil.copytree(folder, copy)
        done.resumed = run(job.resume, module, setting, copies[0], job.resume_epochs)
        done.resumed_by_plain = run(job.resume, module, "plain", copies[1], job.resume_epochs)
    return done


def compared(job: Job, module: Any, setting: str, plain: Run, whole: Run | None, other: Run) -> dict[str, Any]:
    """The line of one setting: how far its run is from the plain one.

    The strategy resumes generators of random numbers, which plain Lightning does not: a run that it resumes is compared
    with a whole plain run, a run that plain Lightning resumes with one that is plain throughout.
    """
    line: dict[str, Any] = {
        "package": job.package,
        "version": version(job.package),
        "namespace": module.NAMESPACE,
        "model": job.model,
        "entry": job.entry,
        "loader": job.loader,
        "setting": setting,
        "steps": len(other.losses),
        "losses": differences({"losses": plain.losses}, {"losses": other.losses}),
        "logged": differences(plain.logged, other.logged),
        "weights": differences(plain.weights, other.weights),
        "predictions": differences(plain.predictions, other.predictions),
        "reloaded": differences(other.predictions, other.reloaded),
        "seconds_plain": round(plain.seconds, 2),
        "seconds": round(other.seconds, 2),
    }
    for name, one, two in (
        ("resumed", whole, other.resumed),
        ("resumed_by_plain", plain.resumed_by_plain, other.resumed_by_plain),
        ("plain_resumed_by_plain", whole, plain.resumed),
    ):
        if one is not None and two is not None:
            ends = {"losses": one.losses[-len(two.losses) :]}, {"losses": two.losses}
            line[name] = max(differences(*ends), differences(one.weights, two.weights))
    note = getattr(module, "RESUME_NOTE", None)
    return line if note is None or not line.get("resumed") else {**line, "resume_note": note}


def main(argv: Sequence[str] | None = None) -> int:
    """0: every job ran and was equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="a module of tests.packages with JOBS and NAMESPACE")
    parser.add_argument("models", nargs="*", help="only these; default all")
    parser.add_argument("--out", type=Path, help="lines of JSON are added to this file")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    module = importlib.import_module(f"tests.packages.{arguments.module}")
    is_good = True
    for job in module.JOBS:
        if arguments.models and job.model not in arguments.models:
            continue
        for line in lines_of(job, module, arguments.settings):
            is_good &= is_equal(line)
            text = json.dumps(line)
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(text + "\n")
    return 0 if is_good else 1


def is_equal(line: Mapping[str, Any]) -> bool:
    """Whether nothing differs and nothing failed."""
    compared = [name for name in COMPARED if name != "resumed" or "resume_note" not in line]
    return "error" not in line and not any(line.get(name, 0.0) for name in compared)


def lines_of(job: Job, module: Any, settings: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One line for each setting after the first, plain one."""
    with tempfile.TemporaryDirectory(prefix="packages-") as name:
        plain = whole = None
        for setting in settings:
            try:
                with in_folder(Path(name) / setting) as folder:
                    done = run_with_resume(job, module, setting, folder)
                if setting == "plain again":
                    require_repeatable(compared(job, module, setting, plain, whole, done))
                    continue
                if plain is not None:
                    yield compared(job, module, setting, plain, whole, done)
                    continue
                plain = whole = done
                if job.resume_epochs != EPOCHS:
                    with in_folder(Path(name) / "whole") as folder:
                        whole = run(job.train, module, setting, folder, job.resume_epochs)
            except Exception as error:
                sys.stderr.write(traceback.format_exc())
                is_refused = job.is_refused and type(error).__name__ == "ConfigurationError"
                line = {"package": job.package, "version": version(job.package), "model": job.model}
                yield {**line, "setting": setting, "refused" if is_refused else "error": str(error)[:500]}
                if plain is None:
                    return


def require_repeatable(line: Mapping[str, Any]) -> None:
    """Raise if two plain runs differ: nothing is to be learned from such a script."""
    different = [name for name in COMPARED if name != "resumed" and line.get(name, 0.0)]
    if different:
        raise ValueError(f"two plain runs differ in {different}: {line}")


@contextmanager
def in_folder(folder: Path) -> Iterator[Path]:
    """A new folder as the current one: packages write logs beside their caller."""
    folder.mkdir()
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(here)


if __name__ == "__main__":
    sys.exit(main())
