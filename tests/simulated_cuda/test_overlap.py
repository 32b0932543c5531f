"""Copies start while compute has work to do, and the host waits only where a bound on memory needs it.

Work is done when somebody waits for it. So where nobody waits, compute's queue grows while blocks are launched: a copy
that is queued while it is not empty can run beside compute, and one that is queued while it is empty cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.device.streams import CudaStreams, WaitFor
from lightning_ssd.errors import RecomputeError
from tests.helpers.training import make_trainer, streamed
from tests.simulated_cuda.device import begin, core
from tests.simulated_cuda.waits import HostWaits

NUM_BLOCKS = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 128)
        self.register_buffer("mask", torch.ones(256, 128).tril())  # too large to be kept

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)) * self.mask)


class Net(pl.LightningModule):
    """Looks, at both ends of a forward and at the end of a step, at what the device was asked for until then."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.seen: list[Seen] = []

    def training_step(self, x: Tensor, index: int) -> Tensor:
        self.seen.append(self.watch.so_far())
        x = x.requires_grad_()
        for block in self.blocks:
            x = block(x)
        self.seen.append(self.watch.so_far())
        return x.square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(self.watch.so_far())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Seen:
    """Of a part of a step: whether each copy of a unit could run beside compute, and what the host waited for."""

    def __init__(self, is_beside: list[bool], waits: Counter[WaitFor], places: Counter[tuple[str, str]]) -> None:
        self.is_beside, self.waits, self.places = is_beside, waits, places

    def since(self, before: Seen) -> Seen:
        return Seen(self.is_beside[len(before.is_beside) :], self.waits - before.waits, self.places - before.places)


class Watch:
    """What the device is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host_waits: HostWaits) -> None:
        self._is_beside: list[bool] = []
        self._host_waits = host_waits
        self._streams: list[CudaStreams] = []
        send, init = CudaStreams.send, CudaStreams.__init__

        def watched(streams: CudaStreams, hosts: Sequence[Tensor]) -> Any:
            self._is_beside.append(core.num_queued_kernels(0) > 0)
            return send(streams, hosts)

        def made(streams: CudaStreams, device: torch.device) -> None:
            init(streams, device)
            self._streams.append(streams)

        monkeypatch.setattr(CudaStreams, "send", watched)
        monkeypatch.setattr(CudaStreams, "__init__", made)

    def so_far(self) -> Seen:
        (streams,) = self._streams
        return Seen(list(self._is_beside), streams.waits.found.copy(), self._host_waits.found.copy())


def last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: type[Net] = Net, **options: Any
) -> tuple[Seen, Seen]:
    """The forward of the last of four steps, and the rest of it."""
    begin(0, "late", 0.0)
    module = make()
    with HostWaits() as host_waits:
        module.watch = Watch(monkeypatch, host_waits)  # type: ignore[assignment]
        data = DataLoader(torch.randn(4 * 256, 128), batch_size=256)
        make_trainer(tmp_path, streamed(**options), max_steps=4).fit(module, data)
    start, middle, end = module.seen[-3:]
    return middle.since(start), end.since(middle)


# Per step: at most. A host buffer of the smallest pool is needed again; an input goes to the disk, or a gradient to its
# update, on a thread that waits for it.
FORWARD: dict[str, tuple[dict[str, Any], dict[WaitFor, int]]] = {
    "keep": ({"activations": "keep"}, {WaitFor.PARAM_BUFFER: NUM_BLOCKS}),
    "recompute, inputs on disk": (
        {"activations": "recompute"},
        {WaitFor.PARAM_BUFFER: NUM_BLOCKS, WaitFor.SPILL: NUM_BLOCKS - 2},
    ),
    "recompute, inputs in host memory": ({"activations": "recompute", "host_memory": "1GiB"}, {}),
    "recompute, inputs on the device": (
        {"activations": "recompute", "host_memory": "1GiB", "device_memory": "64MiB"},
        {},
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_copies_run_beside_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options, most = FORWARD[name]
    forward, rest = last_step(tmp_path, monkeypatch, **options)
    assert forward.is_beside == [True] * NUM_BLOCKS
    assert "device_memory" not in options or len(rest.is_beside) == 0
    assert forward.waits <= Counter(most)
    assert rest.waits <= Counter({WaitFor.GRAD: NUM_BLOCKS, WaitFor.PARAM_BUFFER: NUM_BLOCKS})
    for part in (forward, rest):  # none is hidden
        assert set(part.places) <= {("event", place) for _, place in part.places if "streams.py" in place}
        assert sum(part.places.values()) == sum(part.waits.values())


class Normed(Net):
    """Everybody can reach the small parameters outside of the blocks, whose values are therefore compared."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(128), nn.Linear(128, 4)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return self.out(self.norm(super().training_step(x, index) * x)).square().mean()


def test_values_that_everybody_can_reach_are_compared_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, rest = last_step(tmp_path, monkeypatch, Normed, min_unit_numel=1 << 14, activations="keep")
    found = forward.places + rest.places
    assert not [place for place in forward.places if "fingerprint.py" in place[1]]
    assert 0 < sum(found[place] for place in found if "fingerprint.py" in place[1]) <= 4  # of two units


def halve_the_mask(block: nn.Module, args: Any) -> None:
    block.mask.data.mul_(0.5)  # type: ignore[union-attr, operator]


class WritesLate(Net):
    """The third block writes to its mask without a version, in the third step and not before."""

    def training_step(self, x: Tensor, index: int) -> Tensor:
        if index == 2:
            self.blocks[2].register_forward_pre_hook(halve_the_mask)
        x = x.requires_grad_()
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("max_steps", [3, 4])
def test_a_buffer_that_is_written_by_data_after_the_first_forward_is_refused(tmp_path: Path, max_steps: int) -> None:
    begin(0, "late", 0.0)
    trainer = make_trainer(tmp_path, streamed(activations="recompute"), max_steps=max_steps)
    with pytest.raises(RecomputeError, match=r"wrote to buffer 'mask' of a Block by \.data"):
        trainer.fit(WritesLate(), DataLoader(torch.randn(4 * 256, 128), batch_size=256))
