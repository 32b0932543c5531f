"""What people write in LightningModules and callbacks, under plain Lightning and under the strategy: equal to the bit.

Each case is a module and a set of callbacks; losses, weights, and whatever the case noted down are compared.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as cb
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.helpers.models import GPT
from tests.helpers.odd_models import Checkpointed, Encoder, Hooked, Wandering
from tests.helpers.training import Module, Tokens, make_trainer


class Base(Module):
    """``notes`` are compared too."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(GPT(tie=True) if net is None else net)
        self.notes: list[Any] = []


# ------------------------------------------------------------------------------------------ steps and optimizers


class Gan(Base):
    """Manual optimization with two optimizers that share a unit's module tree."""

    def __init__(self) -> None:
        super().__init__(
            nn.ModuleDict({"g": nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), "d": nn.Linear(8, 1)})
        )
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        noise = batch[0][:, :8].float() / 97
        self.toggle_optimizer(first)
        loss = F.softplus(-self.net["d"](self.net["g"](noise))).mean()
        first.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        first.step()
        self.untoggle_optimizer(first)
        with second.toggle_model():
            loss = (
                F.softplus(self.net["d"](self.net["g"](noise).detach())).mean()
                + F.softplus(-self.net["d"](noise)).mean()
            )
            second.zero_grad()
            self.manual_backward(loss)
            second.step()
        self.losses.append(loss.item())
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam(self.net["g"].parameters(), 1e-2),
            torch.optim.SGD(self.net["d"].parameters(), 0.1, 0.9),
        ]
        return optimizers, [torch.optim.lr_scheduler.StepLR(o, 1) for o in optimizers]


class SkipsSteps(Base):
    """An override that runs the closure itself and steps only sometimes."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        loss = optimizer_closure()
        self.notes.append(loss.item())
        if batch_idx % 3:
            optimizer.step()


class StepsEverySecond(Base):
    """An override in the form of Lightning's documentation: the closure runs always, the step sometimes."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class WarmsUp(Base):
    """Sets the learning rate in the override."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for group in self.optimizers().param_groups:
            group["lr"] = 1e-3 * min(1.0, (self.global_step + 1) / 5)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class ChangesGradients(Base):
    def on_after_backward(self) -> None:
        self.notes.append(self.net.blocks[0].up.weight.grad.sum().item())
        for param in self.parameters():
            if param.grad is not None:
                param.grad.mul_(0.5)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.notes.append({name: value.item() for name, value in grad_norm(self, 2).items()})
        self.net.blocks[1].down.bias.grad = torch.ones_like(self.net.blocks[1].down.bias)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.notes.append(float(nn.utils.clip_grad_norm_(self.parameters(), 0.3)))


class SkipsBatches(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class Penalised(Base):
    """Every parameter is used outside its module."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 1e-3 * sum(p.pow(2).sum() for p in self.parameters())


class OwnBackward(Base):
    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        loss.backward(retain_graph=True)
        (0.5 * loss).backward()


class BackwardInStep(Base):
    """Looks at gradients of its own; Lightning zeroes them before the step's backward."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.zero_grad()  # those of the step before are gone where its updates were streamed
        self.loss(batch).backward()
        self.notes.append(sum(float(p.grad.norm()) for p in self.parameters() if p.grad is not None))
        return super().training_step(batch, batch_idx)


class Schedules(Base):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        self.notes.append(self.optimizers().param_groups[0]["lr"])
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self._kind == "plateau":
            scheduler: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            config = {"scheduler": scheduler, "monitor": "loss", "interval": "step", "frequency": 2}
        elif self._kind == "one cycle":
            config = {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 12), "interval": "step"}
        else:
            config = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": config}


# ----------------------------------------------------------------------------------------------------- callbacks


class Touches(pl.Callback):
    """Changes parameters outside a step, in every way there is."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Base, *args: Any) -> None:
        net, step = module.net, trainer.global_step
        module.notes.append(net.blocks[0].up.weight.norm().item())
        with torch.no_grad():
            net.blocks[0].up.weight.clamp_(-0.1, 0.1)
            net.pos[:2].add_(0.01)
        if step == 3:
            net.blocks[1].down.weight.data = net.blocks[1].down.weight.data * 0.9
        if step == 4:
            net.blocks[2].load_state_dict(net.blocks[0].state_dict())
        if step == 5:
            twin = copy.deepcopy(module.net)
            module.notes.append(sum(p.sum().item() for p in twin.parameters()))
        if step == 6:
            nn.init.zeros_(net.norm.bias)
            module.notes += [p.detach().numpy().mean().item() for p in net.parameters()]


class ReadsInValidation(pl.Callback):
    def on_validation_start(self, trainer: pl.Trainer, module: Base) -> None:
        module.notes.append(sum(p.abs().sum().item() for p in module.parameters()))

    def on_validation_batch_end(self, trainer: pl.Trainer, module: Base, *args: Any) -> None:
        module.notes.append(module.net.tok.weight[3, 3].item())


class ChangesGroups(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.5
            trainer.optimizers[0].param_groups[1]["betas"] = (0.5, 0.7)


class Unfreezes(cb.BaseFinetuning):
    def freeze_before_training(self, module: Base) -> None:
        self.freeze(module.net.blocks)

    def finetune_function(self, module: Base, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net.blocks[1:], optimizer, initial_denom_lr=2)


class Finetuned(Base):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Backbone(Base):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net.blocks

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class FreezesMidway(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, module: Base, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            module.net.blocks[0].requires_grad_(False)
        if trainer.global_step == 7:
            module.unfreeze()


class PlainSgd(Base):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class StopsEarly(Base):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val", float(self.global_step))


class FindsRate(Base):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-3

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def on_train_end(self) -> None:
        self.notes.append(self.lr)


@dataclass(frozen=True)
class Case:
    module: Callable[[], Base] = Base
    callbacks: Callable[[], list[pl.Callback]] = list
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    validate: bool = False


CASES: dict[str, Case] = {
    "gan": Case(Gan),
    "skips steps": Case(SkipsSteps),
    "skips steps, bf16-mixed": Case(SkipsSteps, trainer={"precision": "bf16-mixed"}),
    "steps every second": Case(StepsEverySecond),
    "steps every second, clipped": Case(StepsEverySecond, trainer={"gradient_clip_val": 0.1}),
    "warms up": Case(WarmsUp),
    "changes gradients": Case(ChangesGradients),
    "changes gradients, accumulates": Case(ChangesGradients, trainer={"accumulate_grad_batches": 2}),
    "skips batches": Case(SkipsBatches),
    "skips batches, accumulates": Case(SkipsBatches, trainer={"accumulate_grad_batches": 3}),
    "penalty": Case(Penalised),
    "penalty, bf16-mixed": Case(Penalised, trainer={"precision": "bf16-mixed"}),
    "two backwards": Case(OwnBackward),
    "backward in training_step": Case(BackwardInStep),
    "backward in training_step, kept": Case(BackwardInStep, strategy={"host_memory": "64MiB"}),
    "clipped, kept": Case(Base, trainer={"gradient_clip_val": 0.1}, strategy={"host_memory": "64MiB"}),
    "gan, kept": Case(Gan, strategy={"host_memory": "64MiB"}),
    "steps every second, kept": Case(StepsEverySecond, strategy={"host_memory": "64MiB"}),
    "changes gradients, kept": Case(ChangesGradients, strategy={"host_memory": "64MiB"}),
    "penalty, kept": Case(Penalised, strategy={"host_memory": "64MiB"}),
    "recompute by the user, kept": Case(lambda: Base(Checkpointed(True, True)), strategy={"host_memory": "64MiB"}),
    "user hooks, kept": Case(lambda: Base(Hooked()), strategy={"host_memory": "64MiB"}),
    "plateau": Case(lambda: Schedules("plateau")),
    "one cycle": Case(lambda: Schedules("one cycle"), lambda: [cb.LearningRateMonitor()]),
    "per epoch": Case(lambda: Schedules("per epoch")),
    "recompute by the user": Case(lambda: Base(Checkpointed(False, False))),
    "recompute by the user, reentrant": Case(lambda: Base(Checkpointed(True, False))),
    "recompute by the user, inside": Case(lambda: Base(Checkpointed(False, True))),
    "recompute by the user, inside, reentrant": Case(lambda: Base(Checkpointed(True, True))),
    "recompute by the user, keep": Case(lambda: Base(Checkpointed(True, False)), strategy={"activations": "keep"}),
    "control flow": Case(lambda: Base(Wandering())),
    "control flow, accumulates": Case(lambda: Base(Wandering()), trainer={"accumulate_grad_batches": 2}),
    "encoder": Case(lambda: Base(Encoder()), validate=True),
    # Not validated: in eval on a CPU torch's fast path ignores autocast, and hooks, such as ours, switch that path off.
    "encoder, bf16-mixed": Case(lambda: Base(Encoder()), trainer={"precision": "bf16-mixed"}),
    "user hooks": Case(lambda: Base(Hooked())),
    "touches outside a step": Case(Base, lambda: [Touches()]),
    "touches outside a step, cached": Case(Base, lambda: [Touches()], strategy={"host_memory": "64MiB"}),
    "reads in validation": Case(Base, lambda: [ReadsInValidation()], validate=True),
    "changes groups": Case(Base, lambda: [ChangesGroups()]),
    "swa": Case(
        PlainSgd, lambda: [cb.StochasticWeightAveraging(5e-3, swa_epoch_start=1, annealing_epochs=1)], validate=True
    ),
    "ema": Case(Base, lambda: [cb.EMAWeightAveraging(decay=0.9)], validate=True),
    "accumulation scheduler": Case(Base, lambda: [cb.GradientAccumulationScheduler({0: 2, 1: 1})]),
    "finetuning": Case(Finetuned, lambda: [Unfreezes()]),
    "backbone": Case(Backbone, lambda: [cb.BackboneFinetuning(1, verbose=False)]),
    "freezes midway": Case(Base, lambda: [FreezesMidway()]),
    # The lottery ticket makes parameters share memory with a copy of the first weights, which plain training then
    # overwrites on a CPU, though not on a GPU; here the copy stays as it was.
    "pruning": Case(
        Base, lambda: [cb.ModelPruning("l1_unstructured", use_lottery_ticket_hypothesis=False, amount=0.3)]
    ),
    "early stopping, timer": Case(
        StopsEarly, lambda: [cb.EarlyStopping("val", patience=1), cb.Timer("00:00:10:00")], validate=True
    ),
    "rate finder": Case(FindsRate, lambda: [cb.LearningRateFinder(num_training_steps=5)]),
    "overfit, anomaly": Case(Base, trainer={"overfit_batches": 2, "detect_anomaly": True}),
}


def run(tmp_path: Path, case: Case, strategy: Any) -> tuple[Base, dict[str, Tensor]]:
    pl.seed_everything(4, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = case.module()
        options: dict[str, Any] = {
            "max_epochs": 3,
            "max_steps": -1,
            "logger": _logger(case),
            "callbacks": case.callbacks(),
        }
        trainer = make_trainer(tmp_path, strategy, **(options | case.trainer | _logger(case)))
        loader = DataLoader(Tokens(16), batch_size=4, shuffle=True)
        trainer.fit(module, loader, DataLoader(Tokens(8), batch_size=4) if case.validate else None)
    return module, {name: value.detach().clone() for name, value in module.state_dict().items()}


def _logger(case: Case) -> dict[str, Any]:
    wants = any(isinstance(callback, cb.LearningRateMonitor) for callback in case.callbacks())
    return {"logger": pl.loggers.logger.DummyLogger()} if wants else {}


@pytest.mark.not_simulated(
    reason="its plain side reads tensors of the device by numpy", only=["touches outside a step"]
)
@pytest.mark.not_simulated(reason="torch has no fused LSTM for a simulated device", only=["encoder"])
@pytest.mark.parametrize("name", CASES)
def test_equals_plain_lightning(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    plain, plain_weights = run(tmp_path, case, "auto")
    settings = {"host_memory": "min", "min_unit_numel": 0, "update": "torch"} | case.strategy
    ours, our_weights = run(tmp_path, case, SSDOffloadStrategy(**settings))
    assert plain.losses == ours.losses
    assert plain.val_losses == ours.val_losses
    assert plain.notes == ours.notes
    assert plain_weights.keys() == our_weights.keys()
    assert not [key for key in plain_weights if not torch.equal(plain_weights[key], our_weights[key])]


@pytest.mark.not_simulated(reason="it has no sparse tensors")
def test_sparse_gradients_are_refused(tmp_path: Path) -> None:
    net = GPT()
    net.tok = nn.Embedding(97, 32, sparse=True)
    with pytest.raises(ValueError, match="sparse=False"):
        run(tmp_path, Case(lambda: Base(net)), SSDOffloadStrategy(host_memory="min"))
