"""Inputs of blocks that go to disk and back change no bit of training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ssd.sizes import KiB
from tests.helpers.activations import Spilling
from tests.helpers.fake_device import OffHost
from tests.helpers.models import GPT, Block, ConvNet, ViT
from tests.helpers.odd_models import Wandering
from tests.helpers.training import Images, Tokens, assert_equal, streamed, train
from tests.simulated_cuda import requested


class Masked(nn.Module):
    """Blocks that share a mask, tables, and one input; and that get views, nested, by keyword."""

    class Inner(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.block = Block(width, 4)
            self.mix = nn.Linear(width, width)

        def forward(self, x: Tensor, extra: tuple[Tensor, dict[str, Tensor]], *, mask: Tensor) -> Tensor:
            first, tables = extra
            x = x + self.mix(first * tables["cos"]) * mask
            return self.block(x.transpose(0, 1)).transpose(0, 1)  # its output is not contiguous

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tok = nn.Embedding(97, width)
        self.blocks = nn.ModuleList(self.Inner(width) for _ in range(3))
        self.head = nn.Linear(width, 97)
        self.register_buffer("cos", torch.randn(64, width))

    def forward(self, ids: Tensor) -> Tensor:
        first = x = self.tok(ids)
        mask = (ids > 10).float()[:, :, None].expand_as(x)
        for block in self.blocks:
            x = block(x, (first[:, :], {"cos": self.cos[: ids.shape[1]]}), mask=mask)
        return self.head(x)


class Halves(nn.Module):
    """Two streams that view one tensor."""

    class Inner(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            a = a + self.right(b).tanh()
            return torch.cat([a, b + self.left(a).tanh()], -1)

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(97, 32)
        self.blocks = nn.ModuleList(self.Inner(16) for _ in range(3))
        self.head = nn.Linear(32, 97)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids)
        for block in self.blocks:
            x = block(*x.chunk(2, -1))
        return self.head(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "gpt": (functools.partial(GPT, tie=True), lambda: Tokens(400)),
    "dropout": (functools.partial(GPT, dropout=0.2), lambda: Tokens(400)),
    "vit": (ViT, lambda: Images(400)),
    "conv": (ConvNet, lambda: Images(400)),
    "masked": (Masked, lambda: Tokens(400)),
    "halves": (Halves, lambda: Tokens(400)),
    "wandering": (Wandering, lambda: Tokens(400)),
}
INPUT_NBYTES = 4 * 16 * 32 * 4  # of a block of GPT


@pytest.mark.parametrize("budget", [0, INPUT_NBYTES * 3 // 2, None], ids=["all", "some", "none"])
@pytest.mark.parametrize("model", MODELS)
def test_losses_are_equal_however_much_is_spilled(
    tmp_path: Path,
    spilling: Spilling,
    model: str,
    budget: int | None,
) -> None:
    make_net, data = MODELS[model]
    plain = train(tmp_path, make_net, data=data())
    made = spilling(budget=budget, verify=True)
    ours = train(tmp_path, make_net, streamed(), data=data())
    assert_equal(plain, ours)
    if not (requested() and budget):  # an input stays on the device, and the budget may be enough for the others
        assert (made[0].num_spilled > 0) is (budget is not None)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.5}], ids=str
)
def test_options_are_equal(tmp_path: Path, spilling: Spilling, options: dict[str, Any]) -> None:
    make_net = functools.partial(GPT, tie=True, dropout=0.1)
    plain = train(tmp_path, make_net, **options)
    spilling(budget=0)
    assert_equal(plain, train(tmp_path, make_net, streamed(), **options))


@pytest.mark.parametrize("budget", [4 * KiB, 24 * KiB, 256 * KiB])
def test_the_way_off_a_device_is_equal(
    tmp_path: Path,
    spilling: Spilling,
    budget: int,
) -> None:
    """What happens on a GPU, here with the CPU as the other device."""
    plain = train(tmp_path, Masked)
    spilling(budget=budget, verify=True, streams=OffHost())
    assert_equal(plain, train(tmp_path, Masked, streamed()))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.LlamaForCausalLM(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, attention_mask=(ids > 3).long()).logits

    return Net()


def test_a_hugging_face_model_holds_none_of_its_inputs(tmp_path: Path, spilling: Spilling) -> None:
    """Nobody but us holds them: each block's input and the tables and mask that all share are written, once a step."""
    plain = train(tmp_path, llama, max_steps=3)
    made = spilling(budget=0)
    assert_equal(plain, train(tmp_path, llama, streamed(), max_steps=3))
    assert made[0].num_spilled >= 3 * (2 if requested() else 3)  # on a device the last one stays there
