"""``state="bf16"``: moments in half the bits. Its runs have the same bits however they are cut, planned and resumed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ssd.codec.encodings import FIRST_BF16, NUDGED, SECOND_BF16
from lightning_ssd.errors import ConfigurationError
from tests.strategy.test_state_forms import RUNS, Writes, all_state, assert_same, bits, files_of, fit

CUTS: dict[str, dict[str, Any]] = {
    "after backward": {"overlap": "off"},
    "in memory": {"host_memory": "256MiB"},
    "few large units": {"min_unit_numel": 1_000_000},
    "some memory": {"min_unit_numel": 1000, "host_memory": "24MiB"},
}


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_bits_do_not_depend_on_cut_plan_and_overlap(tmp_path: Path, precision: str) -> None:
    runs = [fit(tmp_path, "bf16", precision=precision, **options) for options in ({}, *CUTS.values())]
    files = {FIRST_BF16, SECOND_BF16} | ({NUDGED} if precision == "bf16-true" else set())
    assert files_of(runs[0]) == {"param"} | files
    for run in runs[1:]:
        assert_same(runs[0], run)
    exact = fit(tmp_path, "fp32", precision=precision)
    assert exact.losses == pytest.approx(runs[0].losses, rel=2e-3)
    assert exact.losses != runs[0].losses


@pytest.mark.parametrize("form", ["file", "links"])
@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, precision: str, form: str) -> None:
    whole = fit(tmp_path, "bf16", precision=precision, max_steps=6)
    path, losses = None, []
    for end in (2, 4, 6):
        part = fit(tmp_path, "bf16", precision=precision, max_steps=end, checkpoint=form, ckpt_path=path)
        losses += part.losses
        path = str(tmp_path / f"{end}.ckpt")
        part.trainer.save_checkpoint(path)
    assert losses == whole.losses
    ours, theirs = all_state(part), all_state(whole)
    assert [name for name in theirs if not torch.equal(bits(ours[name]), bits(theirs[name]))] == []


@pytest.mark.parametrize("name", ["clipped", "accumulated", "frozen", "written to", "Adam with a penalty"])
def test_training_goes_on_as_with_fp32(tmp_path: Path, name: str) -> None:
    """Not equal, but as near as the moments are; masters round to their parameters."""
    plain, narrow = (
        fit(tmp_path, state, callbacks=[Writes()] if "written" in name else [], **RUNS[name])
        for state in ("fp32", "bf16")
    )
    assert narrow.losses == pytest.approx(plain.losses, rel=5e-3)
    masters = all_state(narrow)
    for key, value in narrow.module.named_parameters():
        if key in masters and "written" not in name:  # what was written after the last step is not in the store yet
            assert torch.equal(masters[key].bfloat16(), value.detach()), key


def test_forms_follow_each_other(tmp_path: Path) -> None:
    """From any form a run goes on in any other; into fp32 and split without a loss."""
    for number, (first, then) in enumerate(itertools.permutations(("fp32", "split", "bf16"), 2)):
        run = fit(tmp_path, first, max_steps=2, checkpoint="links")
        path = str(tmp_path / f"{number}.ckpt")
        run.trainer.save_checkpoint(path)
        there = fit(tmp_path, then, max_steps=2, ckpt_path=path)  # loads, and makes no step
        before, after = all_state(run), all_state(there)
        assert before.keys() == after.keys()
        for name, value in before.items():
            if then == "bf16" and "exp_avg" in name:
                torch.testing.assert_close(after[name], value, rtol=2**-8, atol=0)
            else:
                torch.testing.assert_close(after[name], value, rtol=2**-23 if then == "bf16" else 0, atol=0)


def test_a_class_without_the_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"state='bf16' cannot keep the state of unit .*: SGD is not run"):
        fit(tmp_path, "bf16", optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
