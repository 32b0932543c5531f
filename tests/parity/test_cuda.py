"""On a GPU: what plain Lightning computes there, to the bit where the arithmetic is the same, in the planned memory."""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ssd.device.streams import CudaEvent, WaitFor
from lightning_ssd.errors import MemoryPlanError
from lightning_ssd.memory.pinned import Pinned
from lightning_ssd.sizes import MiB
from lightning_ssd.strategy.for_lightning import SSDOffloadPrecision, SSDOffloadStrategy
from lightning_ssd.units.param_cache import ParamCache
from tests.helpers.models import GPT, FunctionalTie
from tests.helpers.plans import choose_plan
from tests.helpers.training import Result, Tokens, assert_equal, train
from tests.parity.test_any_plan import random_choices
from tests.simulated_cuda import requested

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WORKSPACES_NBYTES = 100 * MiB  # cuBLAS keeps one for each thread that computes
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
WIDE = functools.partial(GPT, vocab=512, width=256, layers=6)  # copies long enough to race with compute


@pytest.fixture(autouse=True)
def _same_kernels_each_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


def exact_sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Steps of SGD have the same bits on the CPU and the GPU if every product is exact: factors are powers of two."""
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=2**-4, momentum=0.5)


def run(tmp_path: Path, make_net: Any = GPT, strategy: Any = "auto", **options: Any) -> Result:
    defaults: dict[str, Any] = {"accelerator": "gpu", "deterministic": True, "schedule": False, "optimizer": exact_sgd}
    return train(tmp_path, make_net, strategy, **(defaults | {"data": Tokens(400)} | options))


def assert_same(plain: Result, ours: Result) -> None:
    for result in (plain, ours):
        result.weights = {name: value.cpu() for name, value in result.weights.items()}
    assert_equal(plain, ours)


def with_precision(precision: str) -> dict[str, Any]:
    if precision == "bf16-true":  # without a float32 master, as plain Lightning
        return {"plugins": SSDOffloadPrecision(precision, "cuda", master_dtype="param")}
    return {"precision": precision}


# -- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}],
    ids=["plain", "accumulate", "clip"],
)
@pytest.mark.parametrize("host_memory", ["min", "1GiB"], ids=["streamed", "kept"])
def test_equal_to_plain(tmp_path: Path, host_memory: str, precision: str, options: dict[str, Any]) -> None:
    make_net = functools.partial(GPT, tie=True, dropout=0.1)
    plain = run(tmp_path, make_net, precision=precision, **options)
    strategy = SSDOffloadStrategy(host_memory=host_memory, min_unit_numel=0, update="torch", activations="recompute")
    assert_same(plain, run(tmp_path, make_net, strategy, **with_precision(precision), **options))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_close_to_plain_with_adamw(tmp_path: Path, clip: float | None) -> None:
    """The update of plain Lightning runs on the GPU, and so does the norm: sums and roots round differently there."""
    options: dict[str, Any] = {"accelerator": "gpu", "gradient_clip_val": clip}
    plain = train(tmp_path, GPT, **options)
    ours = train(tmp_path, GPT, SSDOffloadStrategy(host_memory="min", min_unit_numel=0), **options)
    assert plain.losses[0] == ours.losses[0]
    assert plain.losses == pytest.approx(ours.losses, rel=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_any_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    make_net = rng.choice([WIDE, FunctionalTie, functools.partial(GPT, dropout=0.1)])
    options = rng.choice([{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
    plain = run(tmp_path, make_net, **options)
    choose_plan(monkeypatch, lambda draft: random_choices(rng, draft))
    strategy = SSDOffloadStrategy(
        host_memory="1GiB",
        min_unit_numel=rng.choice([0, 1000]),
        update="torch",
        activations=rng.choice(["recompute", "keep"]),
        device_memory=rng.choice(["auto", "16MiB", "1GiB"]),
        overlap=rng.choice(["auto", "auto", "off"]),
    )
    assert_same(plain, run(tmp_path, make_net, strategy, **options))


def test_no_wait_is_missing_where_compute_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute that lags far behind the host and the copies finds every unit's own values."""

    def lagging(net: nn.Module) -> nn.Module:
        for block in net.blocks:  # type: ignore[union-attr]
            block.register_forward_pre_hook(lambda *_: torch.cuda._sleep(20_000_000))  # about 10 ms
        return net

    plain = run(tmp_path, WIDE, max_steps=5)
    strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0, update="torch")
    assert_same(plain, run(tmp_path, lambda: lagging(WIDE()), strategy, max_steps=5))


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_resumed_run_draws_what_the_first_would_have_drawn(tmp_path: Path, activations: str) -> None:
    """Dropout on the device, whose generator is saved and restored; recompute draws the same numbers twice."""
    make_net = functools.partial(GPT, dropout=0.2)

    def strategy() -> SSDOffloadStrategy:
        return SSDOffloadStrategy(host_memory="min", min_unit_numel=0, update="torch", activations=activations)

    whole = run(tmp_path, make_net, strategy(), max_steps=6)
    first = run(tmp_path, make_net, strategy(), max_steps=3)
    path = str(tmp_path / "checkpoint")
    first.trainer.save_checkpoint(path)
    assert whole.losses[:3] == first.losses
    assert whole.losses[3:] == run(tmp_path, make_net, strategy(), max_steps=6, ckpt_path=path).losses


# -- streams and memory ----------------------------------------------------------------------------------------------


@pytest.fixture
def _compute_takes_time() -> Iterator[None]:
    """On the simulated device, too."""
    if requested() is None:
        yield
        return
    from tests.simulated_cuda.device import Rates, takes_time

    with takes_time(Rates(operations=1e12, memory=1e12, pinned=1e10, pageable=1e10)):
        yield


def is_over_before(copied: CudaEvent, busy: torch.cuda.Event) -> bool:
    """Whether ``copied`` is reached while ``busy`` is not. The simulated device knows: its host may be slow."""
    if hasattr(busy, "done_at"):
        return copied.event.done_at() < busy.done_at()
    copied.wait(WaitFor.END)
    return not busy.query()


@pytest.mark.usefixtures("_compute_takes_time")
def test_a_copy_does_not_wait_for_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for it, the next unit arrives while compute is still busy, and the host has not waited."""
    arrived_early: list[bool] = []
    fetch = ParamCache.fetch

    def watched(self: ParamCache, unit: Any) -> bool:
        torch.cuda._sleep(100_000_000)  # compute is busy for some 50 ms
        busy = torch.cuda.Event()
        busy.record()
        is_new = fetch(self, unit)
        if unit.device_copy is not None and unit.device_copy.copied is not None and not busy.query():
            arrived_early.append(is_over_before(unit.device_copy.copied, busy))
        return is_new

    monkeypatch.setattr(ParamCache, "fetch", watched)
    strategy = SSDOffloadStrategy(host_memory="1GiB", min_unit_numel=0, device_memory="1GiB")
    run(tmp_path, WIDE, strategy, max_steps=3)
    assert len(arrived_early) > 10
    assert sum(arrived_early) > 0.8 * len(arrived_early)


def test_the_arena_is_registered_while_training_only(tmp_path: Path) -> None:
    pinned: list[bool] = []
    registered: list[Pinned] = []

    class Net(GPT):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            pools = strategy.session.running.pools
            registered.append(pools._pinned)
            buffer = pools.params.try_lend(4096, "test")
            if buffer is not None:
                pinned.append(buffer.tensor(0, torch.uint8, (4096,)).is_pinned())
                pools.params.give_back(buffer)
            return super().forward(ids)

    strategy = SSDOffloadStrategy(host_memory="1GiB", min_unit_numel=0)
    run(tmp_path, Net, strategy, max_steps=2)
    assert pinned
    assert all(pinned)
    assert not registered[0].is_registered


def test_device_memory_follows_the_plan(tmp_path: Path) -> None:
    """Beside activations and gradients, which the plan does not count, parameters take what it allows."""
    make_net = functools.partial(GPT, width=1024, layers=12)  # 48 MiB a block
    block_nbytes = 12 * 1024**2 * 4
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    strategy = SSDOffloadStrategy(
        host_memory="min", min_unit_numel=0, activations="recompute", device_memory=2 * block_nbytes + MiB
    )
    run(tmp_path, make_net, strategy, max_steps=3, batch_size=1)
    peak = torch.cuda.max_memory_allocated() - before
    # Two blocks of parameters; gradients of one that is computed and of one on its way; activations are small.
    assert peak < 4.5 * block_nbytes + WORKSPACES_NBYTES
    gc.collect()
    assert torch.cuda.memory_allocated() - before < WORKSPACES_NBYTES


def test_device_memory_that_holds_no_chain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MemoryPlanError, match=r"device_memory=1\.00 MiB"):
        run(tmp_path, WIDE, SSDOffloadStrategy(device_memory="1MiB", min_unit_numel=0))


def test_overlap_on_and_off_are_equal(tmp_path: Path) -> None:
    def ours(overlap: Any) -> Result:
        return run(tmp_path, WIDE, SSDOffloadStrategy(host_memory="min", min_unit_numel=0, overlap=overlap))

    assert_same(ours("auto"), ours("off"))


def test_a_second_fit_and_a_failed_step_leave_nothing(tmp_path: Path) -> None:
    class Fails(GPT):
        left = 0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if Fails.left == 0:
                raise ValueError("on purpose")
            Fails.left -= 1
            return super().forward(ids)

    gc.collect()
    before = torch.cuda.memory_allocated()
    for left, expected in ((3, ValueError), (100, None)):
        Fails.left = left
        strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0)
        if expected is None:
            run(tmp_path, Fails, strategy, max_steps=4)
        else:
            with pytest.raises(expected, match="on purpose"):
                run(tmp_path, Fails, strategy, max_steps=10)
        assert strategy.session.runtime is None
    gc.collect()
    assert torch.cuda.memory_allocated() - before < WORKSPACES_NBYTES
