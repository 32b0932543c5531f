"""What a run takes of the device, as its allocator counts it: the budget, activations, and one unit's gradients."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.device.streams import CudaStreams
from lightning_ssd.memory.device_plan import tensors_nbytes
from lightning_ssd.sizes import KiB
from tests.helpers.training import make_trainer, streamed

NUM_SHAPES = 30


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(pl.LightningModule):
    def __init__(self, rows: int, width: int, inner: int, num_blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(num_blocks))
        self.data = DataLoader(torch.randn(6 * rows, width), batch_size=rows)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        x = x.requires_grad_()
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

    def predict_step(self, x: Tensor, index: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def nbytes_of(self, num_blocks: int) -> int:
        """Device memory of so many of its units."""
        return num_blocks * tensors_nbytes(param.nbytes for param in self.blocks[0].parameters())


def peak_of(tmp_path: Path, net: Net, strategy: Any) -> int:
    """The most that tensors take in four steps."""
    torch.cuda.reset_peak_memory_stats()
    make_trainer(tmp_path, strategy, max_steps=4).fit(net, net.data)
    return torch.cuda.max_memory_allocated()


def shape(seed: int) -> tuple[int, int, int, int]:
    rng = random.Random(seed)
    return rng.choice([16, 64, 300]), rng.choice([32, 96, 160]), rng.choice([64, 250]), rng.choice([3, 5, 8])


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[] if n < 2 else [pytest.mark.soak]) for n in range(NUM_SHAPES)]
)
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_the_peak_is_within_the_budget(tmp_path: Path, activations: str, seed: int) -> None:
    """Activations are what a run takes beside parameters that has room for everything, and that is at most what plain
    Lightning takes beside parameters."""
    sizes = shape(seed)
    net = Net(*sizes)
    least, whole = net.nbytes_of(2), net.nbytes_of(sizes[-1])
    plain = peak_of(tmp_path, Net(*sizes), "auto") - whole
    grads = net.nbytes_of(1)
    options: dict[str, Any] = {"activations": activations, "host_memory": "64MiB"}
    roomy = peak_of(tmp_path, Net(*sizes), streamed(device_memory="64MiB", **options)) - whole
    assert roomy <= plain + grads + 64 * KiB  # Lightning's own: metrics, a batch
    for budget in (least, (least + whole) // 2):
        ours = peak_of(tmp_path, Net(*sizes), streamed(device_memory=budget, **options))
        assert ours <= budget + roomy + grads


def test_auto_uses_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on a unit is copied once in a step, and not again where nothing changes it."""
    sent: list[int] = []
    begun: list[int] = []
    send = CudaStreams.send

    def counting(self: CudaStreams, hosts: Any) -> Any:
        sent.append(1)
        return send(self, hosts)

    class Counted(Net):
        def on_train_batch_start(self, *args: Any) -> None:
            begun.append(len(sent))

        def on_predict_batch_start(self, *args: Any) -> None:
            begun.append(len(sent))

    monkeypatch.setattr(CudaStreams, "send", counting)
    net = Counted(64, 32, 64, 6)
    trainer = make_trainer(tmp_path, streamed(host_memory="64MiB"), max_steps=6)
    trainer.fit(net, net.data)
    per_step = [b - a for a, b in zip(begun, [*begun[1:], len(sent)], strict=True)]
    assert per_step[0] > 6
    assert per_step[1:] == [6] * 5
    begun.clear()
    trainer.predict(net, net.data)
    per_step = [b - a for a, b in zip(begun, [*begun[1:], len(sent)], strict=True)]
    assert per_step[0] == 6
    assert per_step[1] == 4  # the first has as little as works: two of them stayed
    assert per_step[2:] == [0] * 4
