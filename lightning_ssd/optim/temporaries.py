"""What an optimizer class allocates while it updates one parameter, found by watching it update a small one. Bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ssd.optim.rules import Options, Rule

PROBE_NUMEL = 256
"""Elements of the small parameter; few, because some classes decompose its outer product."""

UNKNOWN_SHARE = 5.0
"""Assumed where a class cannot be watched: what AdamW with amsgrad allocates, three states and two temporaries."""


def temporary_share(rule: Rule, options: Options, num_dims: int) -> float:
    """Most bytes that are allocated at once in an update of a parameter of ``num_dims`` dimensions, per byte of it.

    That includes the states, which the class makes in its first update. `UNKNOWN_SHARE` if the class cannot be watched,
    such as a schedule-free one that is not in train mode yet.
    """
    try:
        return _watched_share(rule, options, num_dims)
    except Exception:  # the user's class may fail in any way; its real steps report that
        return UNKNOWN_SHARE


def _watched_share(rule: Rule, options: Options, num_dims: int) -> float:
    side = round(PROBE_NUMEL ** (1 / max(num_dims, 1)))
    param = torch.zeros((side,) * max(num_dims, 1))
    grad, options = torch.full_like(param, 1e-3), dict(options)
    states: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    most = 0
    with torch.random.fork_rng(devices=()):
        for is_first in (True, False):
            with _Allocations() as seen:
                rule.update(param, grad, states, scalars, options, is_first=is_first)
            most = max(most, seen.peak_nbytes)
    return most / param.nbytes


class _Allocations(TorchDispatchMode):
    """Counts the memory of tensors that are made inside and still alive.

    Attributes:
        peak_nbytes: The most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_nbytes = 0
        self._alive: dict[int, tuple[Any, int]] = {}  # by storage

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func``."""
        given = {_storage(tensor).cdata for tensor in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = _storage(tensor)
            if storage.cdata not in given and tensor.numel() > 1:  # not a step count
                self._alive[storage.cdata] = (storage, tensor.untyped_storage().nbytes())
        self._alive = {key: found for key, found in self._alive.items() if not found[0].expired()}
        self.peak_nbytes = max(self.peak_nbytes, sum(nbytes for _, nbytes in self._alive.values()))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


def _storage(tensor: Tensor) -> Any:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
