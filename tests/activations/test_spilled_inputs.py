"""Steps whose saved inputs are spilled: graphs used twice, steps that fail, memory, and disks that fail."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_ssd.errors import IOFailure
from lightning_ssd.io import select
from lightning_ssd.session import session as session_module
from tests.faults.support import finish_backward, streamed
from tests.helpers.activations import Bench, Spilling
from tests.helpers.faulty import Fault, FaultyEngine, When
from tests.helpers.models import GPT
from tests.helpers.pools import num_lent
from tests.helpers.training import Module, Tokens, assert_equal, make_trainer, train
from tests.simulated_cuda import requested

NUM_STAYING = 1 if requested() else 0  # on a device the input that was made last stays there

NBYTES = 4 * 16 * 32 * 4  # input of a block of GPT
Step = Callable[[Module, tuple[Tensor, Tensor]], Tensor]


def two_losses(module: Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Two forwards, and then one backward through both."""
    return module.loss(batch) + 0.5 * module.loss((batch[0].flip(0), batch[1]))


def kept_graph(module: Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A backward before the one that counts, through the same graph."""
    loss = module.loss(batch)
    torch.autograd.grad(loss, [module.net.blocks[0].up.weight], retain_graph=True)
    return loss


def abandoned(module: Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A forward without a backward, and half a backward."""
    module.loss(batch)
    x = module.net.tok(batch[0])
    a = module.net.blocks[1](module.net.blocks[0](x))
    torch.autograd.grad(module.net.blocks[2](a).sum(), a)
    return module.loss(batch)


def in_place_after(module: Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What a block got is changed once it is not needed any more."""
    x = module.net.tok(batch[0])
    y = module.net.blocks[0](x)
    torch.autograd.grad(y.square().mean(), x)
    del y
    with torch.no_grad():
        x.zero_()
    return module.loss(batch)


STEPS: list[Step] = [two_losses, kept_graph, abandoned, in_place_after]


class Stepping(Module):
    step: Step

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = type(self).step(self, batch)
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize("budget", [0, 2 * NBYTES])
@pytest.mark.parametrize("step", STEPS)
def test_odd_steps_are_equal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spilling: Spilling,
    step: Step,
    budget: int,
) -> None:
    monkeypatch.setattr("tests.helpers.training.Module", type("M", (Stepping,), {"step": staticmethod(step)}))
    plain = train(tmp_path, GPT)
    made = spilling(budget=budget, verify=True)
    ours = train(tmp_path, GPT, streamed(update="torch"), callbacks=[Returned(made)])
    assert_equal(plain, ours)
    assert made[0].num_spilled > 0 or (NUM_STAYING and budget)


class Returned(pl.Callback):
    """Between steps nothing is held."""

    def __init__(self, made: list[Bench]) -> None:
        self._made = made

    def on_train_batch_start(self, *args: Any) -> None:
        gc.collect()
        self._made[0].assert_all_returned()

    def on_train_end(self, *args: Any) -> None:
        gc.collect()
        self._made[0].assert_all_returned()


class Measured(nn.Module):
    """Blocks that look at which of their inputs are in memory."""

    def __init__(self, num_blocks: int = 8) -> None:
        super().__init__()
        self.tok = nn.Embedding(97, 32)
        self.blocks = nn.ModuleList(self.Inner() for _ in range(num_blocks))
        self.head = nn.Linear(32, 97)
        self.peaks: list[int] = []

    class Inner(nn.Module):
        # Methods of lists, not the lists: what a block holds is put back after its second runs.
        see: Callable[[StorageWeakRef], None]
        all_seen: Callable[[], Iterator[StorageWeakRef]]
        note: Callable[[int], None]

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            self.see(StorageWeakRef(x.untyped_storage()))
            self.note(len({storage.cdata for storage in self.all_seen() if not storage.expired()}))
            return x + self.linear(x).tanh()

    def forward(self, ids: Tensor) -> Tensor:
        seen: list[StorageWeakRef] = []
        x = self.tok(ids)
        for block in self.blocks:
            block.see, block.all_seen, block.note = seen.append, seen.__iter__, self.peaks.append
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("num_inputs", [0, 1, 3, 5])
def test_no_more_inputs_are_in_memory_than_the_budget_allows(
    tmp_path: Path,
    spilling: Spilling,
    num_inputs: int,
) -> None:
    made = spilling(budget=num_inputs * NBYTES)
    held: list[int] = []

    class Watch(pl.Callback):
        def on_before_backward(self, *args: Any) -> None:
            held.append(made[0].held_nbytes)

        def on_after_backward(self, *args: Any) -> None:
            held.append(made[0].held_nbytes)

    result = train(tmp_path, Measured, streamed(), callbacks=[Watch()], max_steps=3)
    assert max(held) <= num_inputs * NBYTES
    # That of the block itself is its caller's. In backward, those of the frame in work and what it was given.
    peaks = result.module.net.peaks
    assert len(peaks) == 3 * 2 * 8 + 8  # each block was tried once
    assert max(peaks) <= num_inputs + 2 + NUM_STAYING
    assert max(peaks[:8]) <= num_inputs + 1 + 2 * NUM_STAYING  # and one that leaves


# -- steps that fail -----------------------------------------------------------------------------------------------


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ZeroDivisionError("in backward")


class Fails(GPT):
    """A block fails in its second step, in forward or in backward."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._calls = 0
        self._where = where
        self.blocks[1].register_forward_pre_hook(self._fail)

    def _fail(self, module: nn.Module, args: Any) -> Any:
        self._calls += 1
        if self._where == "forward" and self._calls == 3:
            raise ZeroDivisionError("in forward")
        if self._where == "backward" and self._calls == 3:
            return (Failing.apply(args[0]),)
        return None


@pytest.mark.parametrize("budget", [0, 2 * NBYTES])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_fails_returns_everything(
    tmp_path: Path,
    spilling: Spilling,
    where: str,
    budget: int,
) -> None:
    made = spilling(budget=budget)
    caught: list[str] = []

    class Check(pl.Callback):
        def on_exception(self, *args: Any) -> None:
            caught.append("seen")

    module = Module(Fails(where))
    trainer = make_trainer(tmp_path, streamed(), callbacks=[Check()], max_steps=4)
    try:
        trainer.fit(module, torch.utils.data.DataLoader(Tokens(40), batch_size=4))
    except ZeroDivisionError as error:
        error.__traceback__ = None
    assert caught
    finish_backward()
    gc.collect()
    assert num_lent(made[0].pool) == 0
    assert made[0].disk_nbytes == 0  # closed with the session


@pytest.mark.parametrize("is_write", [True, False], ids=["write", "read"])
@pytest.mark.parametrize("budget", [0, 3 * NBYTES])
def test_a_disk_that_fails_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spilling: Spilling,
    is_write: bool,
    budget: int,
) -> None:
    def make(options: Any) -> FaultyEngine:
        # One read ahead may be given up and made again, since inputs that stay on a device change the order.
        nth = None if requested() and not is_write else 2
        rule = [When(Fault(error=errno.EIO), "*activations-*.spill", is_write=is_write, nth=nth)]
        return FaultyEngine(select.make_engine(options), rule, deadline_s=options.deadline_s)

    monkeypatch.setattr(session_module, "make_engine", make)
    made = spilling(budget=budget)
    with pytest.raises(IOFailure, match=r"unit 'net.blocks.\d': (writing|reading) an input.*activations-0000\.spill"):
        train(tmp_path, Measured, streamed())
    finish_backward()
    assert made[0].disk_nbytes == 0


def test_an_input_that_is_changed_in_place_is_refused_wherever_it_is(
    tmp_path: Path,
    spilling: Spilling,
) -> None:
    class Changing(GPT):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.tok(ids)
            y = self.blocks[0](x)
            y = self.blocks[1](y)
            x.add_(1)
            return self.head(y)

    for budget in (0, None):
        spilling(budget=budget)
        with pytest.raises(RuntimeError, match="a later operation changed an input of it in place"):
            train(tmp_path, Changing, streamed(), max_steps=1)
        finish_backward()


def test_small_inputs_and_what_is_no_block_are_not_kept(tmp_path: Path, spilling: Spilling) -> None:
    made = spilling(min_nbytes=NBYTES + 1, budget=0)
    train(tmp_path, GPT, streamed(), max_steps=2)
    assert made[0].num_spilled == 0


def test_every_input_is_written_and_read_once_a_step(tmp_path: Path, spilling: Spilling) -> None:
    made = spilling(budget=0)
    train(tmp_path, Measured, streamed(), max_steps=3)
    assert made[0].num_spilled == 3 * (8 - NUM_STAYING)


def test_functional_use_is_equal(tmp_path: Path, spilling: Spilling) -> None:
    """A loss that uses the saved input beside the block."""

    class Residual(GPT):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.tok(ids)
            total = x
            for block in self.blocks:
                x = block(x)
                total = total * F.silu(x)  # saves what the next block gets
            return self.head(total)

    plain = train(tmp_path, Residual)
    spilling(budget=0)
    assert_equal(plain, train(tmp_path, Residual, streamed(update="torch")))
