"""Looking at, and changing, the values of streamed parameters outside a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from lightning_ssd.step.module_hooks import models_of
from lightning_ssd.units.lazy_param import ParamLoader, by_loader


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, every parameter of ``module`` is a plain tensor on its current values; what is written stays.

    Not needed to read or change single parameters, which come to life when they are touched. It helps code that
    bypasses torch's dispatch: a C++ extension that takes raw pointers, and torch.func (``grad``, ``vmap``, ``jvp``)
    with respect to parameters. Outside a step the values are mapped from their files and cost no anonymous memory;
    inside a step, all of them must fit into memory at once.

    Args:
        module: Any module of a model that is under strategy ``ssd_offload``; for others nothing happens.

    Raises:
        ResidencyError: Inside a step, if the parameters do not fit into the memory plan at once.
    """
    params = list(module.parameters())
    # Parameters that are awake do not tell whose they are; hooks on modules do.
    owners: dict[ParamLoader, None] = dict.fromkeys((*(owner for owner, _ in by_loader(params)), *models_of(module)))
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(owner.gather(params))
        yield
