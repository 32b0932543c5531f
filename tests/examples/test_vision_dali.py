"""The image example: its loaders are saved with the checkpoint, so a run goes on with the images that came next."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.example_programs import run_example

needs_dali = pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.dali") is None, reason="the extra `dali` is not installed"
)
TRAIN = "vision_dali/train.py"
NUM_STEPS_PER_EPOCH = 5  # 4 classes of 11 images, 8 in a batch, and a rest


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    run_example("vision_dali/images.py", folder, "--train", 11, "--val", 3)
    return folder


@pytest.mark.parametrize("loader", ["torch", pytest.param("dali", marks=needs_dali)])
def test_a_resume_sees_the_images_that_would_have_come(loader: str, images: Path, tmp_path: Path) -> None:
    """From a checkpoint in the middle of the second epoch, and from one at its end."""
    sizes = ("--batch-size", 8, "--width", 8, "--depth", 2, "--accelerator", "cpu", "--epochs", 3)
    common = ("--images", images, "--loader", loader, *sizes, "--save-every", 1)
    output = run_example(TRAIN, *common, "--out", tmp_path / "out", "--json", tmp_path / "whole.json", cwd=tmp_path)
    assert "15 steps, validation accuracy 0." in output
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert len(whole) == 3 * NUM_STEPS_PER_EPOCH
    assert max(Counter(digest for digest, _ in whole).values()) == 1
    for step in (7, 10):
        resume = ("--resume", tmp_path / "out" / f"step={step}.ckpt", "--out", tmp_path / f"from {step}")
        run_example(TRAIN, *common, *resume, "--json", tmp_path / "rest.json", cwd=tmp_path)
        assert json.loads((tmp_path / "rest.json").read_text()) == whole[step:], f"resumed after step {step}"


def test_the_losses_are_those_of_plain_lightning(images: Path, tmp_path: Path) -> None:
    common = ("--images", images, "--loader", "torch", "--batch-size", 8, "--width", 8, "--depth", 2)
    steps = []
    for strategy in ("auto", "ssd_offload"):
        more = ("--accelerator", "cpu", "--epochs", 1, "--strategy", strategy, "--json", tmp_path / "steps.json")
        run_example(TRAIN, *common, *more, cwd=tmp_path)
        steps.append(json.loads((tmp_path / "steps.json").read_text()))
    assert steps[0] == steps[1]
