"""Trains a program, under plain Lightning or under the strategy, and keeps all that can be compared."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ssd.errors import MemoryPlanError
from lightning_ssd.memory import plan_pools
from lightning_ssd.memory.pool import Pool
from lightning_ssd.session import session as session_module
from lightning_ssd.sizes import KiB
from lightning_ssd.strategy.for_lightning import SSDOffloadPrecision, SSDOffloadStrategy
from tests.fuzz.model import TIME, VOCAB
from tests.fuzz.module import Fuzzed, callbacks
from tests.fuzz.program import Program


@dataclass
class Played:
    """What one side did."""

    seen: list[tuple[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    trace: str = ""
    has_begun: bool = False


def play(program: Program, memory: str | None, folder: Path) -> Played:
    """One side; ``memory`` is None for plain Lightning."""
    folder.mkdir(parents=True)
    played = Played()
    module: Fuzzed | None = None
    with _quiet(), _sessions_closed(poison=True):
        try:
            resume_at = program.resume_at if memory is not None and program.resume_at < program.steps else 0
            stops = [resume_at, program.steps] if resume_at else [program.steps]
            checkpoint = None
            if memory is not None and memory.startswith("+"):  # before the seeds: this too trains, as far as its setup
                memory = str(smallest(program, folder) + int(memory[1:]) * KiB)
            for i, stop in enumerate(stops):
                pl.seed_everything(program.seed if i == 0 else 999, verbose=False)
                if module is not None:
                    module.forget()
                module = Fuzzed(program)
                if i:
                    module.seen = played.seen
                played.seen = module.seen
                path = str(folder / "saved.ckpt")
                save_at = stop * _per_step(program) if i + 1 < len(stops) else 0
                trainer = _trainer(program, memory, folder, stop, callbacks(program, save_at, path))
                trainer.fit(module, *_loaders(program), ckpt_path=checkpoint)
                checkpoint = path
            assert module is not None
            played.state = {
                "state": {name: value.detach().clone() for name, value in module.state_dict().items()},
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "metrics": dict(trainer.callback_metrics),
            }
        except Exception as error:  # whatever it is, it is the result
            played.error, played.trace = error, "".join(traceback.format_exception(error)[-10:])
            error.__traceback__ = None
        if module is not None:
            played.has_begun = module.has_begun
            module.forget()
    return played


def _per_step(program: Program) -> int:
    """How often Lightning counts in one."""
    return 2 if program.manual in ("two_optimizers", "same_parameters", "toggle") else 1


def _trainer(program: Program, memory: str | None, folder: Path, stop: int, hooks: list[pl.Callback]) -> pl.Trainer:
    options: dict[str, Any] = {"strategy": "auto"}
    if memory is not None:
        options["strategy"] = strategy(program, memory, folder)
    if program.precision == "bf16-true" and memory is not None:
        options["plugins"] = [SSDOffloadPrecision("bf16-true", master_dtype="param")]
    else:
        options["precision"] = program.precision
    if program.clip != "none":
        options |= {"gradient_clip_val": 0.3 if program.clip == "norm" else 0.01}
        options |= {"gradient_clip_algorithm": program.clip}
    if program.validation == "every_2":
        options["val_check_interval"] = 2
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=stop * _per_step(program),
        accumulate_grad_batches=program.accumulate,
        num_sanity_val_steps=1 if program.validation == "sanity" else 0,
        limit_val_batches=2,
        callbacks=hooks,
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def strategy(program: Program, memory: str, folder: Path) -> SSDOffloadStrategy:
    """The program's strategy, with ``memory`` as its budget."""
    return SSDOffloadStrategy(
        nvme_path=str(folder),
        host_memory=int(memory) if memory.isdigit() else memory,
        activations=program.activations,
        overlap=program.overlap,
        min_unit_numel=program.min_unit_numel,
        window=program.window,
        update="torch",
    )


def smallest(program: Program, folder: Path) -> int:
    """The smallest ``host_memory`` that works, by the refusal of one that does not."""
    least = dataclasses.replace(program, memory="1KiB", resume_at=0)
    refused = play(least, least.memory, Path(tempfile.mkdtemp(dir=folder)) / "refused").error
    if not isinstance(refused, MemoryPlanError):
        raise refused if refused is not None else AssertionError("1 KiB is not refused")
    found = re.search(r"\((\d+) bytes\)", str(refused))
    assert found, refused
    return int(found[1])


def _loaders(program: Program) -> list[Any]:
    generator = torch.Generator().manual_seed(program.seed)
    data = TensorDataset(*(torch.randint(0, VOCAB, (12, TIME), generator=generator) for _ in range(2)))
    train = DataLoader(data, batch_size=3, shuffle=True)
    return [train] if program.validation == "none" else [train, DataLoader(data, batch_size=4)]


@contextmanager
def _quiet() -> Iterator[None]:
    level = logging.getLogger("lightning.pytorch").level
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("lightning.pytorch").setLevel(level)


@contextmanager
def _sessions_closed(*, poison: bool) -> Iterator[None]:
    """Sessions made inside are closed at the end; buffers are filled with NaN when they are returned."""
    made: list[Any] = []
    init = session_module.Session.__init__

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    pool = functools.partial(Pool, poison=poison)
    with (
        mock.patch.object(session_module.Session, "__init__", recording),
        mock.patch.object(plan_pools, "Pool", pool),
    ):
        try:
            yield
        finally:
            for session in made:
                session.close()
