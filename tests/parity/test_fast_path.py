"""torch's transformer layers: in evaluation too, the path that plain Lightning takes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.training import make_trainer, streamed

WIDTH = 16


class Encoder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.1, batch_first=True)
        self.net = nn.TransformerEncoder(layer, 3)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.seen: list[float] = []
        self.outputs: list[Tensor] = []

    def run(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -2:] = True
        x = self.net(x, src_key_padding_mask=padding)
        return x + self.attention(x, x, x, need_weights=False)[0]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.run(batch).square().mean()
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.outputs.append(self.run(batch))
        assert copy.deepcopy(self.net.layers[0]).forward is not None

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def run(tmp_path: Path, strategy: Any) -> Encoder:
    pl.seed_everything(3, verbose=False)
    module = Encoder()
    data = DataLoader(torch.randn(16, 6, WIDTH, generator=torch.Generator().manual_seed(4)), batch_size=4)  # type: ignore[arg-type]
    make_trainer(tmp_path, strategy, max_steps=4, val_check_interval=2).fit(module, data, data)
    return module


@pytest.mark.not_simulated(reason="it is given tensors of the CPU")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("memory", ["min", "256MiB"])
def test_losses_outputs_and_weights_are_equal(tmp_path: Path, memory: str) -> None:
    plain, ours = run(tmp_path, "auto"), run(tmp_path, streamed(host_memory=memory))
    assert ours.seen == plain.seen
    assert all(map(torch.equal, ours.outputs, plain.outputs))
    assert all(map(torch.equal, ours.parameters(), plain.parameters()))
    assert all("forward" not in vars(module) for module in ours.modules())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_path_is_another_one(tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    module = Encoder().eval()
    x = torch.randn(4, 6, WIDTH)
    with torch.no_grad():
        fused = module.run(x)
        for layer in module.net.layers:
            layer.register_forward_hook(lambda *args: None)
        module.net.use_nested_tensor = False
        assert not torch.equal(module.run(x), fused)
