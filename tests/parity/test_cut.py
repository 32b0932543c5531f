"""However a model holds its blocks, and whatever is a unit inside of them: the bits are those of plain Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ssd.step.gradients import GradientStore
from tests.helpers.skeletons import SKELETONS, FusedMixture, Mixture, SharedPart
from tests.helpers.training import assert_equal, streamed, train


@pytest.mark.parametrize("skeleton", SKELETONS)
def test_equal(tmp_path: Path, skeleton: type[nn.Module]) -> None:
    plain = train(tmp_path, skeleton, max_steps=3, validate=True, limit_val_batches=1)
    for host_memory in ("min", "auto"):
        strategy = streamed(host_memory=host_memory)
        found = train(tmp_path, skeleton, strategy, max_steps=3, validate=True, limit_val_batches=1)
        assert_equal(plain, found)
        assert plain.val_losses == found.val_losses


@pytest.mark.parametrize(
    ("skeleton", "settings", "options"),
    [
        (Mixture, {"activations": "keep"}, {}),
        (Mixture, {"units": ["MixtureBlock", "Linear"]}, {}),
        (Mixture, {}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}),
        (FusedMixture, {}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
        (SharedPart, {"activations": "keep"}, {}),
        (SharedPart, {"overlap": "off"}, {"accumulate_grad_batches": 2}),
    ],
)
def test_parts_of_blocks(
    tmp_path: Path, skeleton: type[nn.Module], settings: dict[str, Any], options: dict[str, Any]
) -> None:
    plain = train(tmp_path, skeleton, max_steps=4, **options)
    assert_equal(plain, train(tmp_path, skeleton, streamed(**settings), max_steps=4, **options))


def test_experts_are_updated_while_backward_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients do not wait for the end of backward, which would be those of all experts."""
    end_backward, waiting = GradientStore.end_backward, list[str]()

    def watch(self: GradientStore) -> None:
        if self._optimizer is not None:
            waiting.extend(unit.name for unit in self._arrived)
        end_backward(self)

    monkeypatch.setattr(GradientStore, "end_backward", watch)
    train(tmp_path, Mixture, streamed(), max_steps=2)
    assert waiting == []


class Clips(Mixture):
    """An expert writes to its own weights in a block that would be recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].experts[1].register_forward_pre_hook(self._clip)

    @staticmethod
    def _clip(expert: nn.Module, args: object) -> None:
        expert.up.weight.data.clamp_(-0.15, 0.15)


def test_an_expert_that_writes_to_itself(tmp_path: Path) -> None:
    plain = train(tmp_path, Clips, max_steps=4)
    assert_equal(plain, train(tmp_path, Clips, streamed(), max_steps=4))


def test_a_run_goes_on_under_another_cut(tmp_path: Path) -> None:
    """What was saved when each layer was one unit: units are names and tensors."""
    plain = train(tmp_path, Mixture, max_steps=6)
    one_unit = streamed(units=["MixtureBlock"])
    train(tmp_path, Mixture, one_unit, max_steps=3, enable_checkpointing=True).trainer.save_checkpoint(
        tmp_path / "x.ckpt"
    )
    resumed = train(tmp_path, Mixture, streamed(), max_steps=6, ckpt_path=str(tmp_path / "x.ckpt"))
    assert resumed.losses == plain.losses[3:]
    assert all(torch.equal(plain.weights[name], value) for name, value in resumed.weights.items())
