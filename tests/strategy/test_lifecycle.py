"""One trainer, many calls: what each leaves to the next, what failures leave behind, how models come to be."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, adamw, make_trainer, streamed


def loader(shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(Tokens(24), batch_size=4, shuffle=shuffle)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


class Whole(Module):
    """A module with every loop; ``cached``: one optimizer for all fits, whose state goes on."""

    def __init__(self, cached: bool = False, net: nn.Module | None = None) -> None:
        super().__init__(GPT(tie=True) if net is None else net, schedule=False)
        self._optimizer = adamw(self) if cached else None

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self._optimizer if self._optimizer is not None else super().configure_optimizers()


def run(
    tmp_path: Path, strategy: Any, story: Callable[[pl.Trainer, Whole], Any], cached: bool = False, **kw: Any
) -> Any:
    pl.seed_everything(2, verbose=False)
    module = Whole(cached)
    trainer = make_trainer(tmp_path, strategy, **({"max_epochs": 1, "max_steps": -1} | kw))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = story(trainer, module)
    return told, weights(module)


def assert_equal_story(
    tmp_path: Path, story: Callable[[pl.Trainer, Whole], Any], cached: bool = False, **kw: Any
) -> None:
    plain, plain_weights = run(tmp_path, "auto", story, cached, **kw)
    ours, our_weights = run(tmp_path, streamed(), story, cached, **kw)
    assert plain == ours
    assert_same(plain_weights, our_weights)


# ---------------------------------------------------------------------------------------------------- many calls


@pytest.mark.parametrize("cached", [False, True])
def test_fit_twice(tmp_path: Path, cached: bool) -> None:
    def story(trainer: pl.Trainer, module: Whole) -> list[float]:
        trainer.fit(module, loader())
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader())
        return module.losses

    assert_equal_story(tmp_path, story, cached)


def test_every_order_of_calls(tmp_path: Path) -> None:
    def story(trainer: pl.Trainer, module: Whole) -> list[Any]:
        told: list[Any] = [trainer.validate(module, loader(), verbose=False)]
        told += [p.sum().item() for p in trainer.predict(module, loader())]
        trainer.fit(module, loader(), loader())
        told += trainer.test(module, loader(), verbose=False)
        told += [p.sum().item() for p in trainer.predict(module, loader())]
        told += trainer.validate(module, loader(), verbose=False)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader())
        told += trainer.test(module, loader(), verbose=False)
        return [*told, module.losses, module.val_losses]

    assert_equal_story(tmp_path, story)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_checkpoint_saved_after_test_has_the_optimizer(tmp_path: Path, precision: str) -> None:
    def save_then_test(trainer: pl.Trainer, module: Whole, *, swap: bool = False) -> None:
        trainer.fit(module, loader(shuffle=False))
        if swap:
            trainer.test(module, loader(shuffle=False), verbose=False)
            trainer.predict(module, loader(shuffle=False))
        trainer.save_checkpoint(tmp_path / "saved.ckpt")

    def resumed(trainer: pl.Trainer, module: Whole) -> list[float]:
        trainer.fit(module, loader(shuffle=False), ckpt_path=tmp_path / "saved.ckpt")
        return module.losses

    results = []
    for swap in (False, True):
        run(tmp_path, streamed(), lambda t, m, swap=swap: save_then_test(t, m, swap=swap), precision=precision)
        results.append(run(tmp_path, streamed(), resumed, precision=precision, max_epochs=2))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])


def test_float32_masters_go_on_in_the_next_fit(tmp_path: Path) -> None:
    def twice(trainer: pl.Trainer, module: Whole, *, scale: float | None) -> list[float]:
        trainer.fit(module, loader(shuffle=False))
        trainer.test(module, loader(shuffle=False), verbose=False)
        if scale is not None:
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(scale)  # masters follow where the 16-bit values are others
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader(shuffle=False))
        return module.losses

    def once(trainer: pl.Trainer, module: Whole) -> list[float]:
        trainer.fit(module, loader(shuffle=False))
        return module.losses

    kept, rewritten, changed = (
        run(tmp_path, streamed(), lambda t, m, scale=scale: twice(t, m, scale=scale), True, precision="bf16-true")[1]
        for scale in (None, 1.0, 1.5)
    )
    whole = run(tmp_path, streamed(), once, True, precision="bf16-true", max_epochs=2)[1]
    assert_same(kept, whole)
    assert_same(rewritten, whole)
    assert all(not torch.equal(kept[name], changed[name]) for name in kept)


def test_after_fit_parameters_are_plain(tmp_path: Path) -> None:
    strategy = streamed()

    def story(trainer: pl.Trainer, module: Whole) -> None:
        trainer.fit(module, loader())
        assert {type(p) for p in module.parameters()} == {nn.Parameter}
        assert not [m for m in module.modules() if m._forward_hooks or m._forward_pre_hooks]
        before = weights(module)
        twin = copy.deepcopy(module)
        strategy.session.close()
        assert_same(before, weights(module))
        assert_same(before, weights(twin))
        module.net(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        optimizer.step()
        assert_same(before, weights(twin))

    run(tmp_path, strategy, story)


def test_by_name_and_fast_dev_run(tmp_path: Path) -> None:
    def story(trainer: pl.Trainer, module: Whole) -> list[float]:
        trainer.fit(module, loader(), loader())
        return module.losses

    results = [run(tmp_path, strategy, story, fast_dev_run=2) for strategy in ("auto", "ssd_offload", streamed())]
    assert results[0][0] == results[2][0]
    assert len(results[1][0]) == 2


def test_no_optimizer(tmp_path: Path) -> None:
    class Frozen(Whole):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.losses.append(self.loss(batch).item())

        def configure_optimizers(self) -> None:
            return None

    losses = []
    for strategy in ("auto", streamed()):
        pl.seed_everything(2, verbose=False)
        module = Frozen()
        make_trainer(tmp_path, strategy, max_epochs=1, max_steps=-1).fit(module, loader())
        losses.append(module.losses)
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------------------------------------- failures


class _Fails(pl.Callback):
    def __init__(self, hook: str, error: type[BaseException]) -> None:
        def fail(trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == 2 and self.armed:
                self.armed = False
                raise error("on purpose")

        self.armed = True
        setattr(self, hook, fail)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "hook",
    [
        "on_train_batch_start",
        "on_after_backward",
        "on_before_optimizer_step",
        "training_step",
        "in forward",
        "in backward",
    ],
)
def test_a_failed_fit_leaves_nothing_and_another_works(tmp_path: Path, hook: str, error: type[BaseException]) -> None:
    pl.seed_everything(2, verbose=False)
    module = Whole()
    if hook.startswith("on_"):
        callback = _Fails(hook, error)
    else:
        callback = pl.Callback()
        calls = iter(range(1000))

        def fail(*args: Any) -> None:
            if next(calls) == 2:
                raise error("on purpose")

        if hook == "in forward":
            module.net.blocks[1].up.register_forward_hook(fail)
        elif hook == "in backward":
            module.net.blocks[1].register_forward_hook(
                lambda m, i, o: o.requires_grad and o.register_hook(fail) and None
            )
        else:
            step = module.training_step
            module.training_step = lambda *args: (fail(), step(*args))[1]  # type: ignore[method-assign]
    threads = threading.active_count()
    trainer = make_trainer(tmp_path, streamed(), callbacks=[callback], max_epochs=1, max_steps=-1)
    with pytest.raises((error, SystemExit)):
        trainer.fit(module, loader())
    assert threading.active_count() == threads
    assert {type(p) for p in module.parameters()} == {nn.Parameter}
    assert all(torch.isfinite(p).all() for p in module.parameters())
    trainer = make_trainer(tmp_path, streamed(), max_epochs=1, max_steps=-1)
    trainer.fit(module, loader())
    assert trainer.global_step == 6
