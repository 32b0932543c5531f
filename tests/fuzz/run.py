"""Says how a program under the strategy compares with the same program under plain Lightning."""

from __future__ import annotations

import dataclasses
import gc
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ssd.errors import ConfigurationError, ResidencyError
from tests.fuzz.play import Played, play
from tests.fuzz.program import Program

EQUAL, REFUSED, LATE, VOID = "equal", "refused", "refused in a step", "void"
GOOD = (EQUAL, REFUSED, LATE, VOID)


@dataclass(frozen=True)
class Verdict:
    """How a program ended: one of `GOOD`, or else what is wrong."""

    kind: str
    detail: str = ""

    @property
    def is_good(self) -> bool:
        return self.kind in GOOD


def judge(program: Program) -> Verdict:
    """Run both sides, in a folder of their own."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        plain = play(program, None, folder / "plain")
        if plain.error is not None:
            return Verdict("plain fails", f"{type(plain.error).__name__}: {plain.error}\n{plain.trace}")
        if not all(_is_finite(value) for _, value in _flat({"seen": plain.seen, **plain.state})):
            return Verdict(VOID, "plain Lightning's numbers are not finite")
        verdict = _compared(program, plain, folder / "ours")
        if verdict.kind != LATE:
            return verdict
        after = _compared(_with_the_way_out(program), plain, folder / "again")
        return verdict if after.is_good else after
    finally:
        gc.collect()
        shutil.rmtree(folder, ignore_errors=True)


def _compared(program: Program, plain: Played, folder: Path) -> Verdict:
    ours = play(program, program.memory, folder)
    if ours.error is None:
        return _difference(plain, ours)
    error, text = ours.error, f"{type(ours.error).__name__}: {ours.error}"
    if isinstance(error, ConfigurationError) and not ours.has_begun and re.search(r"\buse\b|=|\bset\b", str(error)):
        return Verdict(REFUSED, text)
    if ours.has_begun and _is_documented(program, error):
        return Verdict(LATE, text)
    return Verdict(f"{type(error).__name__} {'in a step' if ours.has_begun else 'at setup'}", f"{error}\n{ours.trace}")


PLENTY = "64MiB"  # of host memory, for any program


def _is_documented(program: Program, error: BaseException) -> bool:
    """Whether a refusal within a step is one of the three that there may be.

    What code in a step does outside of modules cannot be known at setup. What it holds at once may not fit into a
    budget near the least: that is said before anything is computed (guide: `ResidencyError`). torch.func does not run
    under the hooks that watch what is saved of parameters, which `gathered` suspends (guide). And a block whose weights
    are written to between its forward and its backward cannot run again; plain Lightning goes on with what the forward
    saved of the old weights and the backward finds of the new ones (guide: `cannot be recomputed`).
    """
    message, is_tight = str(error), program.memory not in ("auto", PLENTY)
    if program.writes_between and "cannot be recomputed" in message:
        return "activations='keep'" in message
    if not isinstance(error, ResidencyError):
        return False
    if "func_grad" in program.features and "with lightning_ssd.gathered(module)" in message:
        return True
    return is_tight and program.holds_several and "raise host_memory" in message


def _with_the_way_out(program: Program) -> Program:
    """What the messages of these refusals ask for, which must do."""
    features = tuple("func_grad_gathered" if name == "func_grad" else name for name in program.features)
    activations = "keep" if program.writes_between else program.activations
    return dataclasses.replace(program, memory=PLENTY, features=features, activations=activations)


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
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and bool(a == b)


def _short(value: Any) -> str:
    return " ".join(str(value).split())[:80]
