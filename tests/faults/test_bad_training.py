"""Steps that go wrong: the run ends with one error, nothing stays behind, and the last checkpoint is whole."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ssd.errors import NonFiniteGradientError
from tests.faults.support import finish_backward, small_gpt, streamed
from tests.helpers.training import Module, Tokens, assert_equal, make_trainer, train

FAILS_AT = 3  # a checkpoint was saved after each of the steps before


class Failing(Module):
    """Does something else in one step."""

    def __init__(self, act: Callable[[Module, Tensor], Any], **kwargs: Any) -> None:
        super().__init__(small_gpt(), **kwargs)
        self._act = act

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return self._act(self, loss) if batch_idx == FAILS_AT else loss


def fit(tmp_path: Path, module: Module, **kwargs: Any) -> pl.Trainer:
    """Six steps with a checkpoint after each."""
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    options = {"max_steps": 6, "enable_checkpointing": True, "callbacks": [saver]} | kwargs
    trainer = make_trainer(tmp_path, streamed(), **options)
    trainer.fit(module, DataLoader(Tokens(400), batch_size=4, shuffle=True))
    return trainer


def failing(act: Callable[[Module, Tensor], Any], **kwargs: Any) -> Failing:
    pl.seed_everything(1, verbose=False)
    return Failing(act, **kwargs)


def assert_resumes(tmp_path: Path, **kwargs: Any) -> None:
    """A new run from the last checkpoint ends where a run that did not fail ends."""
    whole = train(tmp_path / "whole", small_gpt, streamed(), max_steps=6, **kwargs)
    path = str(tmp_path / "saved" / f"step={FAILS_AT}.ckpt")
    rest = train(tmp_path / "rest", small_gpt, streamed(), max_steps=6, ckpt_path=path, **kwargs)
    assert rest.losses == whole.losses[FAILS_AT:]
    rest.losses = whole.losses
    assert_equal(whole, rest)


def raise_(module: Module, loss: Tensor) -> Tensor:
    raise KeyError("the user's own error")


def raise_in_backward(module: Module, loss: Tensor) -> Tensor:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise KeyError("the user's own error")

    # Deep inside: blocks after it are updated already when it raises, those before it are not.
    hook = module.net.blocks[0].register_forward_hook(lambda m, a, out: Bad.apply(out))
    try:
        return module.loss((torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long)))
    finally:
        hook.remove()


@pytest.mark.parametrize("act", [raise_, raise_in_backward])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_an_error_of_the_user_comes_out_as_it_is(tmp_path: Path, act: Any, clip: float | None) -> None:
    module = failing(act)
    with pytest.raises(KeyError, match="the user's own error"):
        fit(tmp_path, module, gradient_clip_val=clip)
    assert all(type(p) is torch.nn.Parameter and torch.isfinite(p).all() for p in module.parameters())
    assert_resumes(tmp_path, gradient_clip_val=clip)


@pytest.fixture
def _sigint() -> Iterator[None]:
    """Lightning ignores further interrupts while it shuts down, and a shell ignores them for what runs behind it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_sigint")
def test_an_interrupt_ends_the_run(tmp_path: Path) -> None:
    def interrupt(module: Module, loss: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return loss

    module = failing(interrupt)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path, module)
    assert_resumes(tmp_path)


@pytest.mark.parametrize("update", ["native", "torch"])
@pytest.mark.parametrize("overlap", ["auto", "off"])
def test_a_gradient_that_is_nan_is_named_and_not_trained_on(tmp_path: Path, update: str, overlap: str) -> None:
    def poison(module: Module, loss: Tensor) -> Tensor:
        return loss + (module.net.blocks[1].up.weight * torch.tensor(float("nan"))).sum()

    module = failing(poison)
    trainer = make_trainer(tmp_path, streamed(update=update, overlap=overlap), max_steps=6)
    with pytest.raises(NonFiniteGradientError, match=r"gradient of parameter 'net\.blocks\.1\.\w+\.\w+' holds NaN"):
        trainer.fit(module, DataLoader(Tokens(400), batch_size=4, shuffle=True))
    assert all(torch.isfinite(p).all() for p in module.parameters())
    finish_backward()


def test_with_a_loss_scaler_it_is_the_scalers_business(tmp_path: Path) -> None:
    """The scaler skips the step, halves its scale, and training goes on, as in plain Lightning."""

    def poison(module: Module, loss: Tensor) -> Tensor:
        return loss + (module.net.blocks[1].up.weight * torch.tensor(float("inf"))).sum()

    def run(strategy: Any) -> tuple[list[float], float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        module = failing(poison)
        trainer = make_trainer(tmp_path, strategy, max_steps=6, plugins=[plugin])
        trainer.fit(module, DataLoader(Tokens(400), batch_size=4))
        return module.losses, scaler.get_scale()

    assert run(streamed(update="torch")) == run("auto")


def test_skipped_batches_keep_no_memory(tmp_path: Path) -> None:
    """A step that returns None has a forward and no backward: its graph must go."""
    seen: list[weakref.ref[Tensor]] = []

    class Skipping(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
            seen.append(weakref.ref(self.net.head(torch.zeros(1, 16)).softmax(-1)))
            logits = self.net(batch[0])
            seen.append(weakref.ref(logits))
            loss = torch.nn.functional.cross_entropy(logits.softmax(-1).flatten(0, 1), batch[1].flatten())
            return None if batch_idx % 2 else loss

    for activations in ("keep", "recompute"):
        trainer = make_trainer(tmp_path, streamed(activations=activations), max_steps=4)
        trainer.fit(Skipping(small_gpt()), DataLoader(Tokens(400), batch_size=4))
        trainer.strategy.session.close()  # type: ignore[attr-defined]
    gc.collect()
    assert [ref for ref in seen if ref() is not None] == []


def test_a_failed_update_leaves_step_counts_as_they_were(tmp_path: Path) -> None:
    """A user who catches the error and goes on, as with a bad batch, gets what plain torch with that batch left out."""

    class Manual(Module):
        def __init__(self, *, bad_batch: bool) -> None:
            super().__init__(small_gpt(), schedule=False)
            self.automatic_optimization = False
            self.bad_batch = bad_batch

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            if self.bad_batch and batch_idx == 1:
                self._bad(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (batch_idx + 1)
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.item())

        def _bad(self, optimizer: Any) -> None:
            optimizer.zero_grad()
            self.manual_backward(self.net.tok.weight.sum() * float("nan"))  # no other unit has a gradient
            with pytest.raises(NonFiniteGradientError, match=r"net\.tok\.weight"):
                optimizer.step()

    def run(*, bad_batch: bool, update: str) -> list[float]:
        pl.seed_everything(1, verbose=False)
        module = Manual(bad_batch=bad_batch)
        make_trainer(tmp_path, streamed(update=update), max_steps=4).fit(module, DataLoader(Tokens(400), batch_size=4))
        return module.losses

    for update in ("native", "torch"):
        assert run(bad_batch=True, update=update) == run(bad_batch=False, update=update)
