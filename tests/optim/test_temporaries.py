"""What an optimizer class is seen to allocate, in bytes per byte of its parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_ssd.optim.choice import choose_rule
from lightning_ssd.optim.temporaries import temporary_share


class Plain(torch.optim.Optimizer):
    """Makes one state, and two temporaries that do not live together."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["sum"] = torch.zeros_like(param)
                state["sum"].add_(param.grad * group["lr"])
                param.sub_(state["sum"] * group["lr"])


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (Plain, 2),
        (lambda params: torch.optim.SGD(params, lr=0.1), 0),
        (lambda params: torch.optim.AdamW(params, amsgrad=True, foreach=False), 5),  # three states, two temporaries
    ],
)
def test_states_of_the_first_update_and_temporaries_are_counted(
    make: Callable[[Any], torch.optim.Optimizer], share: float
) -> None:
    optimizer = make([torch.nn.Parameter(torch.zeros(8, 8))])
    rule = choose_rule(optimizer, "torch", keep_master=False)
    options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    assert temporary_share(rule, options, 2) == pytest.approx(share, abs=0.01)
