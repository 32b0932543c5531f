"""Optimizer classes such as users write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


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
