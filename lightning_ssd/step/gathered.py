"""The public context manager in which parameters are plain tensors, to be read and changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from lightning_ssd.step.module_hooks import models_of
from lightning_ssd.units.lazy_param import by_loader
from lightning_ssd.units.model_units import ModelUnits


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, every parameter of ``module`` is a plain tensor with its current values; writes to it persist.

    Not needed to read or change single parameters, which are loaded at their first use. It is for code that
    bypasses torch's dispatch: a C++ extension that takes raw pointers, and torch.func (``grad``, ``vmap``, ``jvp``)
    with respect to parameters. Outside a step the values are mapped from their files and cost no anonymous memory;
    inside a step, all of them must fit into memory at once.

    Args:
        module: Any module of a model that is under strategy ``ssd_offload``; for others nothing happens.

    Raises:
        ResidencyError: Inside a step, if the parameters do not fit into the memory plan at once.
    """
    params = list(module.parameters())
    # A loaded parameter does not refer to its loader; the hooks of its module do.
    owners: dict[ModelUnits, None] = dict.fromkeys((*(owner for owner, _ in by_loader(params)), *models_of(module)))
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(owner.gather(params))
        yield
