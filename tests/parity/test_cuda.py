"""On a GPU: forward and backward are those of plain Lightning on it; overlap changes nothing."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from lightning_ssd.strategy.lightning_face import SSDOffloadStrategy
from tests.helpers.models import GPT
from tests.helpers.training import assert_equal, train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 3}], ids=str)
def test_training_is_equal(tmp_path: Path, precision: str, options: dict[str, float]) -> None:
    kwargs = {"accelerator": "gpu", "precision": precision, "max_steps": 10, "deterministic": True, **options}
    make_net = functools.partial(GPT, tie=True, dropout=0.1)
    plain = train(tmp_path, make_net, **kwargs)
    strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0, update="torch")
    ours = train(tmp_path, make_net, strategy, **kwargs)
    # The update of plain Lightning runs on the GPU, ours on the CPU: forward and backward are equal, updates close.
    assert plain.losses[0] == ours.losses[0]
    assert plain.losses == pytest.approx(ours.losses, rel=1e-4)


def test_overlap_on_and_off_are_equal(tmp_path: Path) -> None:
    def run(overlap: str) -> object:
        strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0, overlap=overlap)  # type: ignore[arg-type]
        return train(tmp_path, GPT, strategy, accelerator="gpu", max_steps=10, deterministic=True)

    assert_equal(run("auto"), run("off"))  # type: ignore[arg-type]
