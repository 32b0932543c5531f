"""A run that tells its phases, and dies where it was told to: the child of a `storm`.

A child tells its phase through shared memory, so that each kill is counted where it hit. It is killed
- by time: at a random moment of its life;
- in a phase: a random time after the nth entry into it;
- at an operation: before the nth disk transfer of one sort, or the nth change of a name while it saves, removes,
  exports or spills.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ssd.checkpoint.link_file import mark_of
from lightning_ssd.convert.export import consolidate
from lightning_ssd.io.select import make_engine
from lightning_ssd.session import session as session_module
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from lightning_ssd.trace.recorder import Trace
from tests.helpers.faulty import FaultyEngine, Operation
from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, make_trainer

END = 6

PHASES = ("start", "resume", "forward", "backward", "step", "checkpoint", "remove", "export", "between", "end")
"""What the main thread does. Updates and spills are counted beside it: they have threads of their own."""

SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"gradient_clip_val": 0.5},
    "accumulate, clip": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-true, accumulate": {"precision": "bf16-true", "accumulate_grad_batches": 2},
    "in memory, clip": {"gradient_clip_val": 0.5},
    "file": {},
}

STRATEGY: dict[str, dict[str, Any]] = {"in memory, clip": {"host_memory": "64MiB"}, "file": {"checkpoint": "file"}}
"""Settings other than the smallest memory and links. With more, units stay in memory; a checkpoint has them too."""


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
        if trainer.global_step % 2 == 0 and newest is not None and mark_of(str(newest)) is not None:
            with self._hooks.phase("export"):
                consolidate(newest, self._folder / "export.ckpt", overwrite=True)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._hooks.phase("between").__enter__()


def be_child(folder: Path, scenario: str, hooks: Hooks) -> None:
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


def train(folder: Path, scenario: str, hooks: Hooks) -> None:
    """From the newest checkpoint, if there is one, to step `END`; leaves the digest of all weights."""
    newest = newest_checkpoint(folder / "saved")
    log_fd = os.open(folder / "losses", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with hooks.phase("start" if newest is None else "resume"):
        pl.seed_everything(1 if newest is None else 99, verbose=False)
        settings = {"host_memory": "min", "min_unit_numel": 0, "checkpoint": "links"} | STRATEGY.get(scenario, {})
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
    """The one of the latest step; each file that is not hidden must be a checkpoint."""
    found = [(torch.load(path, weights_only=True)["global_step"], path) for path in folder.glob("[!.]*.ckpt")]
    return max(found)[1] if found else None
