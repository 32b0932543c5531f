"""Optimizer classes of any making: plain Lightning's numbers, by parameters or whole, or a refusal at setup."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.optim.probe import probe, small_shape
from tests.helpers.optimizers import CountsInGroup, PerParameter
from tests.helpers.training import make_trainer, streamed

WIDTH, STEPS = 16, 8
KEPT = {"host_memory": "auto", "update": "auto"}


class Net(pl.LightningModule):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(WIDTH, 1)
        self._make = make
        self.losses: list[float] = []
        self.states: dict[int, Any] = {}

    def training_step(self, x: Tensor) -> Tensor:
        loss = self.head(self.net(x)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return self._make(self)


def train(tmp_path: Path, strategy: Any, make: Callable[[Any], Any], *callbacks: Callback, **kwargs: Any) -> Net:
    torch.manual_seed(0)
    model = Net(make)
    data = DataLoader(torch.randn(4 * STEPS, WIDTH, generator=torch.Generator().manual_seed(1)), 4)
    options = {"max_steps": STEPS, "callbacks": list(callbacks), **kwargs}
    resume = options.pop("ckpt_path", None)
    trainer = make_trainer(tmp_path, strategy, **options)
    trainer.fit(model, data, ckpt_path=resume)
    return model


def assert_equal(plain: Net, ours: Net) -> None:
    assert ours.losses == plain.losses
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b), name


class CountsInAttribute(PerParameter):
    def begin(self) -> None:
        self.num_steps += 1

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        p.add_(p.grad, alpha=-group["lr"] / self.num_steps)


class Early(PerParameter):
    """Makes its state in ``__init__``, as torch's Adagrad did; with ``rows`` one of another shape too."""

    def __init__(self, params: Any, rows: bool = False) -> None:
        super().__init__(params)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.tensor(0.0), "sum": torch.full_like(p, 0.1)}
                if rows:
                    self.state[p]["rows"] = torch.ones(p.shape[0])

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state["step"] += 1
        state["sum"].addcmul_(p.grad, p.grad)
        if "rows" in state:
            state["rows"].mul_(0.9).add_(p.grad.reshape(p.shape[0], -1).sum(1).abs())  # type: ignore[union-attr]
            p.mul_(1 - 1e-3 / (1 + state["rows"]).reshape(-1, *[1] * (p.dim() - 1)))
        p.addcdiv_(p.grad, state["sum"].sqrt() + state["step"], value=-group["lr"])


class Late(PerParameter):
    """Makes a full state in its fifth step, and drops it in its seventh."""

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state["n"] = state.get("n", 0) + 1
        super().update(p, group)
        if state["n"] >= 5:
            state.setdefault("slow", p.clone()).lerp_(p, 0.5)
            p.copy_(state["slow"])
        if state["n"] == 7:
            del state["slow"]


class VeryLate(PerParameter):
    """Makes one only under conditions that a trial does not meet."""

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        super().update(p, group)
        if p.numel() > 200 and p.grad.norm() > 0:  # type: ignore[union-attr]
            p.sub_(self.state[p].setdefault("anchor", p.clone()), alpha=1e-3)


class NormOfAll(PerParameter):
    """One parameter's update depends on all gradients."""

    def begin(self) -> None:
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        self.norm = torch.stack(grads).norm()

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        p.add_(p.grad / self.norm, alpha=-group["lr"])


class Noisy(PerParameter):
    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        p.add_(p.grad + 1e-2 * torch.randn_like(p), alpha=-group["lr"])


class MeanOfAll(PerParameter):
    """Pulls parameters to the mean of all, after some steps, or of the large ones alone."""

    def __init__(self, params: Any, after: int = 0, numel: int = 0) -> None:
        super().__init__(params)
        self.after, self.numel = after, numel

    def begin(self) -> None:
        self.num_steps += 1
        params = [p for group in self.param_groups for p in group["params"] if p.numel() > self.numel]
        if self.num_steps > self.after and params:
            mean = torch.stack([p.mean() for p in params]).mean()
            torch._foreach_mul_(params, [0.9] * len(params))
            torch._foreach_add_(params, [mean * 0.1] * len(params))


class Wrapper(Optimizer):
    def __init__(self, base: Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, base.defaults)
        self.param_groups = base.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.base.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)


class Sharp(SGD):
    """Climbs before it descends: needs its closure twice."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            closure()
        climbed = [p.grad * 1e-2 for p in params]
        torch._foreach_add_(params, climbed)
        with torch.enable_grad():
            loss = closure()
        torch._foreach_sub_(params, climbed)
        super().step()
        return loss


STREAMS: dict[str, Callable[[Any], Any]] = {
    "group key": lambda m: CountsInGroup(m.parameters()),
    "attribute": lambda m: CountsInAttribute([{"params": [p]} for p in m.parameters()]),
    "early state": lambda m: Early(m.parameters()),
    "early state of another shape": lambda m: Early(m.parameters(), rows=True),
    "late state": lambda m: Late(m.parameters()),
    "state that no trial shows": lambda m: VeryLate(m.parameters()),
    "factored": lambda m: Adafactor(m.parameters(), lr=1e-2),
    "tensor lr": lambda m: AdamW(m.parameters(), lr=torch.tensor(1e-2)),
}
WHOLE: dict[str, Callable[[Any], Any]] = {
    "norm of all": lambda m: NormOfAll(m.parameters()),
    "random": lambda m: Noisy(m.parameters()),
    "wrapper": lambda m: Wrapper(AdamW(m.parameters(), lr=1e-2)),
    "closure": lambda m: Sharp(m.parameters(), lr=1e-2),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3),
}


@pytest.mark.not_simulated(reason="it draws random numbers where the update runs", only=["random"])
@pytest.mark.parametrize("make", [*STREAMS.values(), *WHOLE.values()], ids=[*STREAMS, *WHOLE])
def test_equal_to_plain_lightning(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    plain = train(tmp_path, "auto", make)
    assert_equal(plain, train(tmp_path, streamed(), make))


def test_a_whole_one_equals_with_the_default_settings_and_resumes(tmp_path: Path) -> None:
    make = WHOLE["wrapper"]
    plain = train(tmp_path, "auto", make)
    strategy = streamed(**KEPT)
    assert_equal(plain, train(tmp_path, strategy, make))
    half = train(tmp_path, half_strategy := streamed(), make, max_steps=STEPS // 2)
    half.trainer.save_checkpoint(tmp_path / "half")
    assert half_strategy.session.plan.whole_nbytes > 0
    resumed = train(tmp_path, streamed(), make, ckpt_path=str(tmp_path / "half"))
    assert resumed.losses == plain.losses[STEPS // 2 :]


@pytest.mark.parametrize("name", ["factored", "group key", "late state"])
def test_a_streamed_one_resumes_with_each_parameters_own_states(tmp_path: Path, name: str) -> None:
    plain = train(tmp_path, "auto", STREAMS[name])
    half = train(tmp_path, streamed(), STREAMS[name], max_steps=6)
    half.trainer.save_checkpoint(tmp_path / "half")
    resumed = train(tmp_path, streamed(), STREAMS[name], ckpt_path=str(tmp_path / "half"))
    assert resumed.losses == plain.losses[6:]


def test_one_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    class Idle(PerParameter):
        def update(self, p: Tensor, group: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigurationError, match="Idle changed no parameter"):
        train(tmp_path, streamed(), lambda m: Idle(m.parameters()))


def test_a_warm_up_from_nothing_is_not_refused() -> None:
    params = [nn.Parameter(torch.randn(4, 4))]
    assert probe(CountsInGroup(params, lr=0.0)).moves
    assert torch.equal(params[0], params[0])
    assert probe(Adafactor([nn.Parameter(torch.randn(32, 1))])).kinds == ("row_var",)
    assert small_shape((4096, 1024, 1)) == (16, 8, 1)


def reads(model: Net) -> Optimizer:
    lr = 1e-2 * float(1 + model.head.weight.norm())
    nn.init.constant_(model.head.bias, 0.5)
    model.net[0][0].weight.data = model.net[0][0].weight.data * 0.5
    model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})
    return AdamW(model.parameters(), lr=lr)


@pytest.mark.parametrize("settings", [{}, KEPT], ids=["min", "kept"])
def test_configure_optimizers_may_read_and_write_values(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain = train(tmp_path, "auto", reads)
    assert_equal(plain, train(tmp_path, streamed(**settings | {"update": "torch"}), reads))


@pytest.mark.parametrize("options", [{"after": 60}, {"numel": 4000}, {"after": 2, "numel": 4000}], ids=str)
def test_one_that_mixes_late_or_only_large_parameters_is_found(options: dict[str, int]) -> None:
    params = [nn.Parameter(torch.randn(shape)) for shape in ((128, 128), (128, 128), (128,), (4, 4))]
    assert probe(MeanOfAll(params, **options)).why_whole == "one parameter's update depends on the others"


class Midway(Callback):
    def __init__(self, act: Callable[[pl.Trainer, Net], Any]) -> None:
        self._act = act

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEPS // 2:
            self._act(trainer, module)


def replace(trainer: pl.Trainer, module: Net) -> None:
    trainer.strategy.optimizers = [AdamW(module.parameters(), lr=1e-2)]


def clear(trainer: pl.Trainer, module: Net) -> None:
    trainer.optimizers[0].state = defaultdict(dict)


def edit(trainer: pl.Trainer, module: Net) -> None:
    state = trainer.optimizers[0].state
    assert len(state) == len(list(module.parameters()))
    state[module.head.weight]["exp_avg"].mul_(0.5)
    state[module.head.bias]["exp_avg"] = torch.ones(1)
    state[module.net[0][0].weight]["step"].zero_()
    del state[module.net[1][0].weight]


@pytest.mark.not_simulated(reason="plain Lightning does not run it on a device either", only=["edit"])
@pytest.mark.parametrize("act", [replace, clear, edit])
@pytest.mark.parametrize("settings", [{}, {"host_memory": "auto"}], ids=["min", "kept"])
def test_state_that_is_replaced_midway(tmp_path: Path, act: Callable[..., Any], settings: dict[str, Any]) -> None:
    def make(module: Net) -> Optimizer:
        return AdamW(module.parameters(), lr=1e-2)

    plain = train(tmp_path, "auto", make, Midway(act))
    assert_equal(plain, train(tmp_path, streamed(**settings), make, Midway(act)))


class Alternating(Net):
    def __init__(self) -> None:
        super().__init__(lambda m: (AdamW(m.parameters(), 1e-2), AdamW(m.parameters(), 3e-2, betas=(0.5, 0.9))))
        self.automatic_optimization = False

    def training_step(self, x: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()[batch_idx % 2]  # type: ignore[index]
        optimizer.zero_grad(set_to_none=False)
        self.manual_backward(super().training_step(x))
        optimizer.step()


def test_two_optimizers_of_the_same_parameters_keep_their_own_state(tmp_path: Path) -> None:
    def run(strategy: Any, name: str, steps: int, ckpt: str | None = None) -> Alternating:
        torch.manual_seed(0)
        model = Alternating()
        trainer = make_trainer(tmp_path, strategy, max_steps=steps)
        data = DataLoader(torch.randn(4 * STEPS, WIDTH, generator=torch.Generator().manual_seed(1)), 4)
        trainer.fit(model, data, ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / name)
        return model

    plain = run("auto", "plain", STEPS)
    assert_equal(plain, run(streamed(), "whole", STEPS))
    run(streamed(), "half", STEPS // 2)
    resumed = run(streamed(), "resumed", STEPS, str(tmp_path / "half"))
    assert resumed.losses == plain.losses[STEPS // 2 :]


def test_a_layer_made_in_a_fit_is_refused_by_name(tmp_path: Path) -> None:
    def grow(trainer: pl.Trainer, module: Net) -> None:
        trainer.optimizers[0].add_param_group({"params": nn.Linear(3, 5).parameters()})

    with pytest.raises(ConfigurationError, match=r"shape \(5, 3\) that was not in the LightningModule when"):
        train(tmp_path, streamed(), lambda m: SGD(m.parameters(), 1e-2), Midway(grow))
