"""Optimizers and schedules of programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from tests.helpers.optimizers import PerParameter


class SignDescent(PerParameter):
    """A class of the user's own, with state."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        average = self.state[p].setdefault("average", torch.zeros_like(p))
        average.lerp_(p.grad, 0.1)
        p.sub_(average.sign(), alpha=group["lr"])


class Counting(SignDescent):
    """Counts its steps in its groups, as much research code does."""

    def begin_group(self, group: dict[str, Any]) -> None:
        group["step"] = group.get("step", 0) + 1

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        p.data.mul_(1 - 1e-3 / group["step"])
        super().update(p, group)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2),
    "adam": functools.partial(torch.optim.Adam, lr=1e-2, weight_decay=0.01),
    "amsgrad": functools.partial(torch.optim.Adam, lr=1e-2, amsgrad=True, maximize=True),
    "foreach_adamw": functools.partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "fused_adamw": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=0.05),
    "momentum": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5),
    "centered": functools.partial(torch.optim.RMSprop, lr=1e-3, centered=True),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2),
    "nadam": functools.partial(torch.optim.NAdam, lr=1e-3),
    "radam": functools.partial(torch.optim.RAdam, lr=1e-3),
    "adamax": functools.partial(torch.optim.Adamax, lr=1e-3),
    "adadelta": functools.partial(torch.optim.Adadelta, lr=0.1),
    "adafactor": functools.partial(torch.optim.Adafactor, lr=1e-2),
    "rprop": functools.partial(torch.optim.Rprop, lr=1e-3),
    "asgd": functools.partial(torch.optim.ASGD, lr=1e-2),
    "sign": SignDescent,
    "counting": Counting,
}


def groups(how: str, params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The groups that an optimizer gets."""
    if how == "decay":
        kinds = [[p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]]
        return [{"params": kind, "lr": lr} for kind, lr in zip(kinds, (1e-2, 5e-3), strict=True) if kind]
    if how == "each":
        return [{"params": [param], "lr": 1e-2 / (i + 1)} for i, param in enumerate(params)]
    return [{"params": params}]


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.7),
    "epoch": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "onecycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=40),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0),
}


def with_schedule(how: str, optimizer: Optimizer) -> Any:
    """What `configure_optimizers` returns."""
    if how == "none":
        return optimizer
    made = {"scheduler": SCHEDULES[how](optimizer), "interval": "epoch" if how in ("epoch", "plateau") else "step"}
    return {"optimizer": optimizer, "lr_scheduler": made | ({"monitor": "val_loss"} if how == "plateau" else {})}
