"""Optimizer classes such as users write, and settings of those that rules are tested with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

OPTIONS: dict[type[Optimizer], list[dict[str, Any]]] = {
    Adam: [{}, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1}, {"maximize": True}],
    AdamW: [{}, {"lr": 0.1, "weight_decay": 0.3}, {"maximize": True, "betas": (0.0, 0.99)}],
    SGD: [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    torch.optim.Adagrad: [{}],
    torch.optim.RMSprop: [{"momentum": 0.5, "centered": True}],
    torch.optim.Adafactor: [{}],
}
"""Arguments of optimizer classes, apart from the parameters; those with a rule have one for every branch of it."""


class PerParameter(Optimizer):
    """Plain descent; what it keeps beside is up to the subclass."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin()
        for group in self.param_groups:
            self.begin_group(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    def begin(self) -> None: ...

    def begin_group(self, group: dict[str, Any]) -> None: ...

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        p.add_(p.grad, alpha=-group["lr"])


class CountsInGroup(PerParameter):
    def begin_group(self, group: dict[str, Any]) -> None:
        group["step"] = group.get("step", 0) + 1

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        p.add_(p.grad, alpha=-group["lr"] / group["step"] ** 0.5)
