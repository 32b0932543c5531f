"""Runs a program under plain Lightning and under the strategy, and says how they compare.

``python -m tests.fuzz.run 12 300`` tries the seeds from 12 to 299 and prints a line for each that fails, with the
smallest program that still fails; ``python -m tests.fuzz.run "Program(seed=3, ...)"`` tries one program.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ssd.errors import ConfigurationError, MemoryPlanError, ResidencyError
from lightning_ssd.memory.pool import Pool
from lightning_ssd.sizes import KiB
from lightning_ssd.strategy import session as session_module
from lightning_ssd.strategy.lightning_face import SSDOffloadPrecision, SSDOffloadStrategy
from tests.fuzz.model import TIME, VOCAB
from tests.fuzz.module import Fuzzed, callbacks
from tests.fuzz.program import Program, draw

EQUAL, REFUSED, VOID, NO_ROOM = "equal", "refused", "void", "no room"
GOOD = (EQUAL, REFUSED, VOID, NO_ROOM)


@dataclass(frozen=True)
class Verdict:
    """How a program ended: one of `GOOD`, or else what is wrong."""

    kind: str
    detail: str = ""

    @property
    def is_good(self) -> bool:
        return self.kind in GOOD


@dataclass
class Played:
    """What one side did."""

    seen: list[tuple[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    trace: str = ""
    has_begun: bool = False


def compare(program: Program, folder: Path) -> Verdict:
    """Run both sides."""
    plain = play(program, None, folder / "plain")
    if plain.error is not None:
        return Verdict("plain fails", f"{type(plain.error).__name__}: {plain.error}\n{plain.trace}")
    if not all(_is_finite(value) for _, value in _flat({"seen": plain.seen, **plain.state})):
        return Verdict(VOID, "plain Lightning's numbers are not finite")
    ours = play(program, program.memory, folder / "ours")
    if ours.error is not None:
        return _judge_error(program, ours)
    return _difference(plain, ours)


def _judge_error(program: Program, ours: Played) -> Verdict:
    error = ours.error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ConfigurationError) and not ours.has_begun and re.search(r"\buse\b|=|\bset\b", str(error)):
        return Verdict(REFUSED, text)
    if isinstance(error, ResidencyError) and _holds_all(program) and "host_memory" in str(error):
        return Verdict(NO_ROOM, text)
    when = "in a step" if ours.has_begun else "at setup"
    return Verdict(f"{type(error).__name__} {when}", f"{error}\n{ours.trace}")


# Habits that hold values of the whole model at once, in a step. What code in a step will hold cannot be known at setup:
# where the budget has no room for it, the documented refusal (guide: `ResidencyError`) comes before anything is computed.
HOLDING = {"swap_in_step", "snapshot_restore", "func_grad", "flat_penalty", "functional_call", "foreach_norm"}
HOLDING_TEACHERS = {"state_dict", "load_state_dict", "foreach_lerp", "foreach_mul_add"}


def _holds_all(program: Program) -> bool:
    return program.memory != "auto" and (bool(HOLDING & set(program.features)) or program.teacher in HOLDING_TEACHERS)


def _difference(plain: Played, ours: Played) -> Verdict:
    for i, ((word, a), (other, b)) in enumerate(zip(plain.seen, ours.seen, strict=False)):
        if word != other:
            return Verdict("different", f"note {i} is of {word!r}, ours of {other!r}")
        if not _same(a, b):
            return Verdict("different", f"note {i}, {word}: {_short(a)}, ours {_short(b)}")
    if len(plain.seen) != len(ours.seen):
        return Verdict("different", f"{len(plain.seen)} notes, ours {len(ours.seen)}")
    a, b = dict(_flat(plain.state)), dict(_flat(ours.state))
    if a.keys() != b.keys():
        return Verdict("different", f"at the end, only one has {sorted(a.keys() ^ b.keys())[:4]}")
    wrong = [name for name in a if not _same(a[name], b[name])]
    if wrong:
        return Verdict("different", f"at the end, {wrong[:4]}: {_short(a[wrong[0]])}, ours {_short(b[wrong[0]])}")
    return Verdict(EQUAL)


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
            for i, stop in enumerate(stops):
                pl.seed_everything(program.seed if i == 0 else 999, verbose=False)
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
        played.has_begun = module is not None and module.has_begun
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
    """The program's strategy."""

    def made(host_memory: Any) -> SSDOffloadStrategy:
        return SSDOffloadStrategy(
            nvme_path=str(folder),
            host_memory=host_memory,
            activations=program.activations,
            overlap=program.overlap,
            min_unit_numel=program.min_unit_numel,
            window=program.window,
            update="torch",
        )

    if not memory.startswith("+"):
        return made(memory)
    return made(smallest(program, folder) + int(memory[1:]) * KiB)


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


# ------------------------------------------------------------------------------------------------------------ helpers


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
    with mock.patch.object(session_module.Session, "__init__", recording), mock.patch.object(session_module, "Pool", pool):
        try:
            yield
        finally:
            for session in made:
                session.close()


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _flat(part, f"{name}.{i}")
    else:
        yield name, value


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex()) or bool(torch.isfinite(value).all())
    return not isinstance(value, float) or abs(value) < float("inf")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _short(value: Any) -> str:
    return " ".join(str(value).split())[:80]


def shrink(program: Program, kind: str, tried: int = 80) -> tuple[Program, Verdict]:
    """The smallest program found that ends in the same ``kind``."""
    verdict = Verdict(kind)
    progress = True
    while progress:
        progress = False
        for candidate in program.smaller():
            tried -= 1
            found = judge(candidate)
            if found.kind == kind:
                program, verdict, progress = candidate, found, True
                break
            if tried <= 0:
                return program, verdict
    return program, verdict


def judge(program: Program) -> Verdict:
    """`compare` in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        return compare(program, folder)
    finally:
        gc.collect()
        shutil.rmtree(folder, ignore_errors=True)


def plain_only(first: int, last: int) -> None:
    for seed in range(first, last):
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        plain = play(draw(seed), None, folder / "plain")
        shutil.rmtree(folder)
        if plain.error is not None:
            print(f"{draw(seed)}\n   {plain.error!r}"[:700], plain.trace.strip()[-600:] if "-v" in sys.argv else "", flush=True)
        elif not all(_is_finite(value) for _, value in _flat({"seen": plain.seen, **plain.state})):
            print(f"{draw(seed)}\n   not finite", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    if "--plain" in arguments:
        return plain_only(int(arguments[0]), int(arguments[1]))
    if arguments[0].startswith("Program"):
        print(judge(eval(arguments[0])))
        return
    first, last = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else int(arguments[0]) + 1
    without = [words[len("--without=") :].split(",") for words in arguments if words.startswith("--without=")]
    without = sum(without, [])
    counts: Counter[str] = Counter()
    signatures: Counter[str] = Counter()
    for seed in range(first, last):
        program = draw(seed)
        if any(word in str(program) for word in without):
            continue
        print(f"# {seed}", end="\r", flush=True)
        verdict = judge(program)
        counts[verdict.kind] += 1
        if not verdict.is_good:
            print(f"{verdict.kind}: {program}\n    {verdict.detail}", flush=True)
            signature = verdict.kind + re.sub(r"[\d.]+|'[^']*'", "N", verdict.detail)[:60]
            signatures[signature] += 1
            if "--shrink" in arguments and (verdict.kind == "different" or signatures[signature] < 3):
                program, verdict = shrink(program, verdict.kind)
                print(f"  smallest: {program}\n    {verdict.detail}", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
