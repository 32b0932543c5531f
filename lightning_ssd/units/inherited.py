"""A model in a forked process: plain parameters with the values of the fork, and nothing that streams.

[Note: inherited] A child (a worker of a DataLoader, a user's `os.fork`) has its parent's objects without its threads.
So it takes nothing from them but where values are: a generation's file, which the parent writes no more
(`Generation.is_inherited`) and the child maps for itself alone, or memory that was passed on ([Note: forks]). What it
writes stays with it. It cannot run updates, save, or remove anything; all of that is refused or does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ssd.errors import ResidencyError
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.store.tensor_metadata import METADATA
from lightning_ssd.units.mapped import snapshot
from lightning_ssd.units.unit import Unit


class Inherited:
    """Where values are in a forked process, which fetches nothing.

    Args:
        store: Where values are.
        refusals: Why the values of a unit at the fork are not known here, by name.
    """

    def __init__(self, store: StateStore, refusals: Mapping[str, str]) -> None:
        self._store = store
        self._refusals = refusals

    def values(self, unit: Unit) -> tuple[Tensor, ...]:
        """What the parameters of ``unit``, which are lazy, were at the fork.

        Raises:
            ResidencyError: Nobody knows.
        """
        if unit.name in self._refusals:
            raise ResidencyError(
                f"parameter {unit.names[0]!r} cannot be read in this forked process: {self._refusals[unit.name]}"
            )
        if unit.in_memory is not None:
            return unit.in_memory
        generation = self._store.current(unit.name, "param")
        if generation is None:
            raise ResidencyError(f"parameter {unit.names[0]!r} was being placed when this process was forked")
        return snapshot(self._store, generation)

    def refuse_fetch(self, unit: Unit) -> None:
        """Refuse to fetch ``unit``.

        Raises:
            ResidencyError: Always.
        """
        raise ResidencyError(
            f"unit {unit.name!r} cannot be fetched in a forked process, which can look at parameters and compute with "
            "them, but cannot train"
        )


class Refused:
    """Stands for a part of the parent's in a forked process: any use of it raises.

    Args:
        what: What cannot be done.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> Any:
        raise ResidencyError(f"{self._what} in a forked process: it belongs to the process that trains; do it there")


def refused_gradient(like: Tensor, name: str) -> Tensor:
    """A gradient that has the form of ``like`` and no values: it waits in a file of the parent's."""

    class GradientOfParent(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs or {})
            raise ResidencyError(
                f"the gradient of parameter {name!r} cannot be read in a forked process: it waits in a file to which "
                "the process that trains goes on to write; fork after the step, or raise host_memory"
            )

    # One element for all: autograd cannot add to it either.
    return torch.full((), torch.nan, dtype=like.dtype).expand(like.shape).as_subclass(GradientOfParent)
