"""A snapshot of the Python state that a forward may change, to be restored for its second run.

[Note: Python state] Before a block runs, the contents of every object that can be reached from its arguments and from
itself are recorded: of dicts, lists, sets, attributes, generators, and variables that its functions use from outside.
For the second run the objects get these contents back, and afterwards those that they had before it. Of tensors only
the version is recorded, since a change in place cannot be undone. An object that cannot be read without changing it (an
iterator), or is too large, makes the state *opaque*: the block is not recomputed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import is_
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ssd.step.state_holders import (
    Holder,
    cells_of,
    dict_holder,
    holder_of,
    is_foreign,
    parts_of,
    slots_holder,
)

MAX_OBJECTS = 20_000
"""With more objects than these the state is opaque."""

_ATOMS = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device, torch.Size)
_HOOKS = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}

Change = Callable[[Tensor], object]


class PythonState:
    """The contents of all objects that can be reached from some roots; see [Note: Python state].

    Args:
        roots: Where to start; the snapshot does not hold them.
        around: Holders of variables outside, see `surroundings`.

    Attributes:
        opaque: Why the state is opaque; None if it is not.
    """

    def __init__(self, roots: Iterable[object], around: Iterable[Holder] = ()) -> None:
        self.opaque: str | None = None
        self._holders: list[tuple[Holder, Any]] = []
        self._tensors: list[tuple[Tensor, int]] = []
        self._seen: dict[int, object] = {}
        self._has_detached: bool = False
        self._reached: list[Tensor] = []
        waiting: list[object] = [*roots]
        for holder in around:
            self._note(holder, waiting)
        while waiting:
            self._look_at(waiting.pop(), waiting)
        self._seen.clear()
        if self.opaque or any(not tensor.is_leaf for tensor in self._reached):
            self.map(_detached)
        self._reached.clear()

    def map(self, change: Change) -> None:
        """Replace each tensor in the snapshot by what ``change`` returns for it."""

        def replace(held: Tensor | _Detached) -> object:
            tensor = held.tensor() if isinstance(held, _Detached) else held
            new = change(tensor)
            found = held if new is tensor else new
            self._has_detached = self._has_detached or isinstance(found, _Detached)
            return found

        self._has_detached = False
        self._holders = [(h, mapped(old, (Tensor, _Detached), replace)) for h, old in self._holders]

    @property
    def is_written(self) -> bool:
        """Whether a tensor was changed in place since."""
        return any(t._version != version for t, version in self._tensors)

    @property
    def is_changed(self) -> bool:
        """Whether an object has other contents now. Tensors in place of those that `map` replaced are not seen."""
        return any(not _may_be_same(holder.read(), old) for holder, old in self._holders)

    @contextmanager
    def restored(self, load: Callable[[object], object] | None = None) -> Iterator[None]:
        """Inside, objects have the contents of the snapshot; afterwards those that they had before.

        Args:
            load: Is called with each value inside the contents, and returns the one to put there; None for as it is.
        """
        before = [(holder, holder.read()) for holder, _ in self._holders]
        try:
            for (holder, now), (_, old) in zip(before, self._holders, strict=True):
                value = mapped(old, _Detached, _Detached.tensor) if self._has_detached else old
                _change(holder, now, value if load is None else mapped(value, object, load))
            yield
        finally:
            for holder, old in reversed(before):
                _change(holder, holder.read(), old)

    # -- looking -------------------------------------------------------------------------------------------------

    def _look_at(self, value: object, waiting: list[object]) -> None:
        if isinstance(value, _ATOMS) or id(value) in self._seen or isinstance(value, nn.Parameter):
            return
        if len(self._seen) >= MAX_OBJECTS:
            self.opaque = self.opaque or f"more than {MAX_OBJECTS} objects"
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._reached.append(value)
            if not value.is_inference():
                self._tensors.append((_watch(value), value._version))
        elif isinstance(value, nn.Module):
            self._look_at_module(value, waiting)
        elif isinstance(value, (tuple, frozenset)):
            waiting.extend(value)
        elif isinstance(value, (FunctionType, MethodType, partial)):
            waiting.extend(parts_of(value))
            for holder in cells_of(value):
                self._note(holder, waiting)
        else:
            self._look_at_object(value, waiting)

    def _look_at_module(self, module: nn.Module, waiting: list[object]) -> None:
        attributes = vars(module)
        self._note(dict_holder(attributes), [])
        for name, value in attributes.items():
            if name == "_buffers" and isinstance(value, dict):  # the frame restores their values
                self._note(dict_holder(value), [])
            elif name not in _HOOKS or value:
                waiting.append(value)

    def _look_at_object(self, value: object, waiting: list[object]) -> None:
        holder = holder_of(value)
        if holder is not None:
            self._note(holder, waiting)
        elif isinstance(value, Iterator):
            self.opaque = self.opaque or f"an iterator ({type(value).__name__})"
        elif isinstance(value, np.ndarray) and value.flags.writeable:
            self.opaque = self.opaque or "a large NumPy array"
        if is_foreign(type(value)):
            return
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._note(dict_holder(attributes), waiting)
        slots = slots_holder(value)
        if slots is not None:
            self._note(slots, waiting)

    def _note(self, holder: Holder, waiting: list[object]) -> None:
        contents = holder.read()
        self._holders.append((holder, contents))
        waiting.extend(holder.values(contents))


def mapped(value: Any, kind: type[Any] | tuple[type[Any], ...], change: Callable[[Any], Any]) -> Any:
    """``value``, in which each object of ``kind`` inside nested plain tuples is replaced by ``change`` of it."""
    if type(value) is tuple:
        return tuple(mapped(item, kind, change) for item in value)
    return change(value) if isinstance(value, kind) else value


def _change(holder: Holder, now: Any, contents: Any) -> None:
    """Write ``contents`` to ``holder``, which has the contents ``now``, unless they are the same."""
    if not _is_same(now, contents):
        holder.write(contents)


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not tuple or type(b) is not tuple or len(a) != len(b):
        return False
    return all(map(is_, a, b)) or all(map(_is_same, a, b))  # the first is fast


def _may_be_same(now: Any, old: Any) -> bool:
    """As `_is_same`, where ``old`` may have something else in place of a tensor."""
    if type(now) is tuple and type(old) is tuple:
        return len(now) == len(old) and all(map(_may_be_same, now, old))
    return now is old or (isinstance(now, Tensor) and not isinstance(old, Tensor))


class _Detached:
    """Stands for a tensor with history: a snapshot that held it would keep the graphs of past steps in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._values = tensor.detach()

    def tensor(self) -> Tensor:
        """The tensor, or one with the same values."""
        live = self._tensor()
        # Autocast caches casts of leaves: what was none must not become one.
        return live if live is not None else self._values.detach().requires_grad_().view_as(self._values)


def _watch(tensor: Tensor) -> Tensor:
    """A tensor that shares the version counter of ``tensor``; without its memory where that is possible."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return tensor.detach()
    with torch.no_grad():
        watcher = tensor.detach()
        watcher.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return watcher


def _detached(tensor: Tensor) -> object:
    return tensor if tensor.is_leaf else _Detached(tensor)
