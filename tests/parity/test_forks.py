"""What a forked process sees of the model, and what it cannot do to the run."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ssd.memory import plan_pools
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.helpers.children import DEADLINE_S, Child
from tests.helpers.training import make_trainer, streamed
from tests.simulated_cuda import requested

D = 24
STEPS = 6
Values = list[list[float]]

PLANS: dict[str, Callable[[], SSDOffloadStrategy]] = {
    "streamed": streamed,
    "cached": lambda: streamed(host_memory="11MiB"),
    "in memory": lambda: SSDOffloadStrategy(min_unit_numel=0, update="torch"),
}


def make_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(4)))


def values(net: nn.Module) -> Values:
    return [param.detach().flatten()[:3].tolist() for param in net.parameters()]


class Model(pl.LightningModule):
    """Looks at nothing by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.losses: list[float] = []
        self.in_step: Callable[[Model], None] = lambda module: None
        self.in_backward: Callable[[Model], None] = lambda module: None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.net[:2](batch)
        self.in_step(self)
        hidden.register_hook(lambda grad: self.in_backward(self))
        loss = (self.net[2:](hidden) - batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.losses.append(self.net(batch).square().mean().item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Mined(Dataset[Tensor]):
    """Its items depend on the model of the moment at which its worker was made."""

    def __init__(self, model: Model, steps: int = STEPS) -> None:
        self._model = model
        self._data = torch.randn(2 * steps, D, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self._data)

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        net = self._model.net
        return self._data[index] + 0.1 * net[0][0].weight[0] + 0.1 * net(self._data[index])


def fit(tmp_path: Path, strategy: Any, *callbacks: Callback, model: Model | None = None, **options: Any) -> Model:
    model = model or Model()
    data = torch.randn(2 * STEPS, D, generator=torch.Generator().manual_seed(1))
    trainer = make_trainer(tmp_path, strategy, max_steps=STEPS, callbacks=list(callbacks), **options)
    trainer.fit(model, DataLoader(data, batch_size=2))  # type: ignore[arg-type]
    return model


class At(Callback):
    """Calls ``act`` once, in ``hook`` of step 3."""

    def __init__(self, hook: str, act: Callable[[Any, Model], None]) -> None:
        self._act = act
        setattr(self, hook, self._call)

    def _call(self, trainer: Any, module: Model, *args: Any) -> None:
        if trainer.global_step == 3:
            self._act(trainer, module)
            self._act = lambda trainer, module: None


# -- workers -------------------------------------------------------------------------------------------------------


@pytest.mark.not_simulated(reason="a forked process of plain Lightning cannot use the device", only=["streamed"])
@pytest.mark.not_simulated(reason="a fork does not share memory that is registered with the device", only=["in memory"])
@pytest.mark.parametrize("plan", ["streamed", "in memory"])
def test_workers_that_look_at_the_model_see_the_weights_of_the_fork(tmp_path: Path, plan: str) -> None:
    """New ones in each epoch, some that persist, and those of validation beside them."""

    def run(strategy: Any) -> list[float]:
        model = Model()
        options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork", "timeout": DEADLINE_S}
        train = DataLoader(Mined(model, 3), batch_size=2, **options)
        val = DataLoader(Mined(model, 1), batch_size=2, persistent_workers=True, **options)
        make_trainer(tmp_path, strategy, max_steps=-1, max_epochs=3).fit(model, train, val)
        # Kept workers, which hold descriptors, end with what they are part of.
        for loader in (train, val):
            if loader._iterator is not None:
                loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        return model.losses

    assert run(PLANS[plan]()) == run("auto")


# -- what a child sees ---------------------------------------------------------------------------------------------


@pytest.mark.not_simulated(
    reason="a fork does not share memory that is registered with the device", only=["in memory", "cached"]
)
@pytest.mark.parametrize(
    ("plan", "where"),
    [
        *((plan, where) for plan in ("streamed", "in memory") for where in ("loaded", "in a step", "before the step")),
        *((plan, "between") for plan in PLANS),
    ],
)
def test_a_child_sees_the_fork_however_far_the_parent_goes_on(tmp_path: Path, plan: str, where: str) -> None:
    found: list[tuple[Child, Values]] = []

    def write_and_look(module: Model) -> list[Values]:
        before = values(module.net)
        with torch.no_grad():
            for param in module.net.parameters():
                param.mul_(2)
        return [before, values(module.net)]

    def fork(module: Model) -> None:
        if where == "loaded":
            with torch.no_grad():
                module.net[1][0].weight.add_(0.5)  # before the fork: it is the child's too
        child = Child(lambda: write_and_look(module))
        found.append((child, values(module.net)))

    hook = {"before the step": "on_before_optimizer_step"}.get(where, "on_train_batch_end")

    def in_step(module: Model) -> None:
        if where == "in a step" and len(module.losses) == 3:
            fork(module)

    def run(strategy: Any) -> list[float]:
        model = Model()
        model.in_step = in_step
        callbacks = [At(hook, lambda trainer, module: None if where == "in a step" else fork(module))]
        return fit(tmp_path, strategy, *callbacks, model=model).losses

    streamed_losses, plain_losses = run(PLANS[plan]()), run("auto")
    assert streamed_losses == plain_losses
    for child, expected in found:
        answer = child.answer()
        if requested() and child is found[1][0]:
            break  # plain Lightning's cannot use a device
        assert answer == [expected, [[2 * x for x in row] for row in expected]]
    assert found[0][1] == found[1][1]


@pytest.mark.not_simulated(reason="a forked process cannot use the device")
def test_a_child_runs_the_modules_and_has_gradients_of_its_own(tmp_path: Path) -> None:
    found: list[Child] = []

    def learn(module: Model) -> list[Any]:
        module.zero_grad()
        loss = module.net(torch.ones(2, D)).square().mean()
        loss.backward()
        grad = module.net[0][0].weight.grad
        assert grad is not None
        return [loss.item(), grad.sum().item()]

    act = At("on_train_batch_end", lambda trainer, module: found.append(Child(lambda: learn(module))))
    fit(tmp_path, streamed(), act)
    act = At("on_train_batch_end", lambda trainer, module: found.append(Child(lambda: learn(module))))
    fit(tmp_path, "auto", act)
    ours, plain = (child.answer() for child in found)
    assert ours == plain


@pytest.mark.parametrize("plan", ["streamed", "in memory"])
def test_after_the_run_neither_sees_what_the_other_writes(tmp_path: Path, plan: str) -> None:
    model = fit(tmp_path, PLANS[plan]())
    weight = model.net[0][0].weight
    with torch.no_grad():
        weight[0] = 1.0
    child = Child(lambda: [values(model.net), weight.detach().fill_(5.0).sum().item()])
    before = values(model.net)
    with torch.no_grad():
        model.net[1][0].weight.fill_(7.0)
    assert child.answer() == [before, 5.0 * D * D]
    after = values(model.net)
    assert after[0] == before[0]
    assert after[2] == [7.0, 7.0, 7.0]
    model.trainer.save_checkpoint(tmp_path / "checkpoint")
    again = Model()
    fit(tmp_path, PLANS[plan](), model=again)
    assert again.losses == fit(tmp_path, "auto").losses


# -- what it is refused --------------------------------------------------------------------------------------------


def answers_at(
    tmp_path: Path, hook: str, work: Callable[[Any, Model], Any], strategy: Any = None, **options: Any
) -> Any:
    found: list[Child] = []
    act = At(hook, lambda trainer, module: found.append(Child(lambda: work(trainer, module))))
    model = fit(tmp_path, strategy or streamed(), act, **options)
    answer = found[0].answer()
    assert model.losses == fit(tmp_path, "auto", **options).losses
    return answer


@pytest.mark.parametrize(
    ("work", "what"),
    [
        (lambda trainer, module: trainer.optimizers[0].step(), "cannot make steps"),
        (lambda trainer, module: trainer.optimizers[0].state[module.net[0][0].weight], "nor show"),
        (lambda trainer, module: trainer.optimizers[0].state_dict(), "nor show"),
        (lambda trainer, module: trainer.save_checkpoint("x"), "nor show"),
        (lambda trainer, module: trainer.save_checkpoint("x", weights_only=True), "cannot be saved"),
        (lambda trainer, module: trainer.strategy.backward(module.net(torch.ones(1, D)).sum(), None), "a step"),
    ],
)
def test_what_belongs_to_the_run_is_refused(tmp_path: Path, work: Callable[[Any, Model], Any], what: str) -> None:
    answer = answers_at(tmp_path, "on_train_batch_end", work)
    assert answer.startswith("ResidencyError")
    assert what in answer


@pytest.mark.parametrize("plan", ["streamed", "in memory"])
def test_a_fork_inside_a_backward_that_updates_is_told(tmp_path: Path, plan: str) -> None:
    found: list[Child] = []

    def fork(module: Model) -> None:
        if len(module.losses) == 3:
            found.append(Child(lambda: values(module.net)))

    model = Model()
    model.in_backward = fork
    fit(tmp_path, PLANS[plan](), model=model)
    answer = found[0].answer()
    assert answer.startswith("ResidencyError")
    assert "inside the backward" in answer
    assert model.losses == fit(tmp_path, "auto").losses


def test_a_fork_by_the_thread_that_updates_is_told(tmp_path: Path) -> None:
    """Which cannot wait for itself."""
    found: list[Child] = []
    model = Model()

    class Forks(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if len(model.losses) == 3 and not found:
                found.append(Child(lambda: values(model.net)))
            return super().step(closure)

    model.configure_optimizers = lambda: Forks(model.parameters(), lr=1e-2)  # type: ignore[method-assign]
    fit(tmp_path, streamed(), model=model)
    assert found[0].answer().startswith("ResidencyError")


@pytest.mark.not_simulated(reason="a fork does not share memory that is registered with the device")
def test_parameters_in_memory_are_not_passed_on_where_a_copy_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(trainer: Any, module: Model) -> Any:
        return values(module.net)

    monkeypatch.setattr(plan_pools, "available_nbytes", lambda: 100)
    answer = answers_at(
        tmp_path, "on_train_batch_end", lambda trainer, module: values(module.net), PLANS["in memory"]()
    )
    assert "lower host_memory" in answer


@pytest.mark.not_simulated(reason="a forked process cannot use the device")
def test_gradients_that_wait_in_files_are_refused(tmp_path: Path) -> None:
    """But not those that wait in memory."""

    def look(trainer: Any, module: Model) -> list[float]:
        grad = module.net[0][0].weight.grad
        assert grad is not None
        assert grad.shape == (D, D)
        if hasattr(trainer.strategy, "session") and trainer.strategy.session.plan.in_memory_grads is False:
            with pytest.raises(RuntimeError):  # neither may autograd add to it
                module.net(torch.ones(1, D)).sum().backward()
        return [grad.sum().item()]

    assert "waits in a file" in answers_at(tmp_path, "on_before_optimizer_step", look)
    assert isinstance(answers_at(tmp_path, "on_before_optimizer_step", look, PLANS["in memory"]()), list)


# -- what it leaves alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["exit", "return"])
def test_a_child_that_ends_takes_nothing_along(tmp_path: Path, end: str) -> None:
    """Also where the end goes up through the Trainer, which tears the strategy down."""
    parent = os.getpid()
    children: list[int] = []

    def fork(trainer: Any, module: Model) -> None:
        children.append(os.fork())
        if children[-1] == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if end == "exit":
                sys.exit(3)

    model = Model()
    try:
        fit(tmp_path, streamed(), At("on_train_batch_end", fork), model=model)
    except BaseException:
        if os.getpid() == parent:
            raise
    if os.getpid() != parent:
        weakref.finalize._exitfunc()  # type: ignore[attr-defined]  # what the end of the interpreter runs
        os._exit(3)
    assert os.waitpid(children[0], 0)[1] >> 8 == 3
    assert model.losses == fit(tmp_path, "auto").losses
    model.trainer.save_checkpoint(tmp_path / "checkpoint")


def test_a_child_has_no_copy_of_the_memory_of_the_plan(tmp_path: Path) -> None:
    def anonymous_nbytes() -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    class Large(Model):
        def __init__(self) -> None:
            super().__init__()
            self.net.append(nn.Linear(D, 40_000, bias=False))
            self.net.append(nn.Linear(40_000, D, bias=False))

    found: list[tuple[Child, int]] = []

    def fork(trainer: Any, module: Model) -> None:
        found.append((Child(anonymous_nbytes), anonymous_nbytes()))

    model = Large()
    fit(tmp_path, PLANS["in memory"](), At("on_train_batch_end", fork), model=model)
    child, parent_nbytes = found[0]
    states_nbytes = 2 * 4 * 2 * 40_000 * D
    assert child.answer() < parent_nbytes - states_nbytes * 0.9
