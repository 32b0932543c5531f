"""``state="bf16"`` and ``"int8"``: moments in fewer bits. However they are cut, planned and resumed, runs are equal."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ssd.codec.encodings import (
    FIRST_BF16,
    FIRST_LOG8,
    FIRST_SCALE,
    NUDGED,
    SECOND_BF16,
    SECOND_LOG8,
    SECOND_SCALE,
)
from lightning_ssd.errors import ConfigurationError
from tests.strategy.test_state_forms import RUNS, Writes, all_state, assert_same, bits, files_of, fit, session_of

CUTS: dict[str, dict[str, Any]] = {
    "after backward": {"overlap": "off"},
    "in memory": {"host_memory": "256MiB"},
    "few large units": {"min_unit_numel": 1_000_000},
    "some memory": {"min_unit_numel": 1000, "host_memory": "24MiB"},
}


MOMENTS = {"bf16": {FIRST_BF16, SECOND_BF16}, "int8": {FIRST_LOG8, FIRST_SCALE, SECOND_LOG8, SECOND_SCALE}}


@pytest.mark.parametrize("state", MOMENTS)
@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_bits_do_not_depend_on_cut_plan_and_overlap(tmp_path: Path, precision: str, state: str) -> None:
    runs = [fit(tmp_path, state, precision=precision, **options) for options in ({}, *CUTS.values())]
    assert files_of(runs[0]) == {"param"} | MOMENTS[state] | ({NUDGED} if precision == "bf16-true" else set())
    for run in runs[1:]:
        assert_same(runs[0], run)
    exact = fit(tmp_path, "fp32", precision=precision)
    assert exact.losses == pytest.approx(runs[0].losses, rel=2e-3)
    assert exact.losses != runs[0].losses


class Odd(nn.Module):
    """Parameters of several chunks, which are cut within their blocks, alone or in one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(97, 1023)
        self.layers = nn.Sequential(*(nn.Linear(1023, 1023) for _ in range(3)))
        self.head = nn.Linear(1023, 97)
        for layer in (self.layers[1], self.head):  # their elements lie in another order than that of their shape
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.tok(ids)))  # type: ignore[no-any-return]


def test_a_block_that_a_chunk_would_cut_is_not_cut(tmp_path: Path) -> None:
    options: dict[str, Any] = {"make_net": Odd, "max_steps": 3}
    runs = [fit(tmp_path, "int8", units=units, **options) for units in ("auto", ["Odd"])]
    sizes = [max(unit.layout.numel for unit in session_of(run).units) for run in runs]
    assert sizes[0] < 1_100_000 < 3_000_000 < sizes[1]
    assert_same(*runs)
    runs[1].trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = fit(tmp_path, "int8", ckpt_path=str(tmp_path / "a.ckpt"), **options)  # loads, and makes no step
    ours, theirs = all_state(resumed), all_state(runs[0])
    assert [name for name in theirs if not torch.equal(bits(ours[name]), bits(theirs[name]))] == []


@pytest.mark.parametrize(("state", "form"), [("bf16", "file"), ("bf16", "links"), ("int8", "file"), ("int8", "links")])
@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, precision: str, state: str, form: str) -> None:
    whole = fit(tmp_path, state, precision=precision, max_steps=6)
    path, losses = None, []
    for end in (2, 4, 6):
        part = fit(tmp_path, state, precision=precision, max_steps=end, checkpoint=form, ckpt_path=path)
        losses += part.losses
        path = str(tmp_path / f"{end}.ckpt")
        part.trainer.save_checkpoint(path)
    assert losses == whole.losses
    ours, theirs = all_state(part), all_state(whole)
    assert [name for name in theirs if not torch.equal(bits(ours[name]), bits(theirs[name]))] == []


@pytest.mark.parametrize(("state", "tolerance"), [("bf16", 5e-3), ("int8", 3e-2)])
@pytest.mark.parametrize("name", ["clipped", "accumulated", "frozen", "written to", "Adam with a penalty"])
def test_training_goes_on_as_with_fp32(tmp_path: Path, name: str, state: str, tolerance: float) -> None:
    """Not equal, but as near as the moments are; masters round to their parameters."""
    plain, narrow = (
        fit(tmp_path, state, callbacks=[Writes()] if "written" in name else [], **RUNS[name])
        for state in ("fp32", state)
    )
    assert narrow.losses == pytest.approx(plain.losses, rel=tolerance)
    masters = all_state(narrow)
    for key, value in narrow.module.named_parameters():
        if key in masters and "written" not in name:  # what was written after the last step is not in the store yet
            assert torch.equal(masters[key].bfloat16(), value.detach()), key


def test_forms_follow_each_other(tmp_path: Path) -> None:
    """From any form a run goes on in any other; into fp32 and split without a loss."""
    for number, (first, then) in enumerate(itertools.permutations(("fp32", "split", "bf16", "int8"), 2)):
        run = fit(tmp_path, first, max_steps=2, checkpoint="links")
        path = str(tmp_path / f"{number}.ckpt")
        run.trainer.save_checkpoint(path)
        there = fit(tmp_path, then, max_steps=2, ckpt_path=path)  # loads, and makes no step
        before, after = all_state(run), all_state(there)
        assert before.keys() == after.keys()
        for name, value in before.items():
            rtol, atol = 0.0, 0.0
            if then in MOMENTS:
                rtol = 2**-23 if "exp_avg" not in name else 2**-8 if then == "bf16" else 2**-4
                atol = float(value.abs().max()) * 2**-15 if then == "int8" and "exp_avg" in name else 0.0
            if first != then or first not in MOMENTS:
                torch.testing.assert_close(after[name], value, rtol=rtol, atol=atol)


def test_a_class_without_the_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"state='bf16' cannot keep the state of unit .*: SGD is not run"):
        fit(tmp_path, "bf16", optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
