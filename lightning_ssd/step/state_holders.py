"""What holds Python state: dicts, lists, attributes, closures, generators; each can be read, compared and written."""

from __future__ import annotations

import random
import sys
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

MAX_ARRAY_NBYTES = 1 << 20
"""Writable NumPy arrays up to this size are copied; larger ones are opaque."""

_FOREIGN = (sys.stdlib_module_names - {"collections", "types"}) | {
    "lightning",
    "lightning_fabric",
    "lightning_ssd",
    "numpy",
    "pytorch_lightning",
    "torch",
}
_MISSING = object()


class Holder(ABC):
    """Something whose contents can be read and written. The contents are a tuple, or one value."""

    @abstractmethod
    def read(self) -> Any:
        """The contents now."""

    @abstractmethod
    def write(self, contents: Any) -> None:
        """Make ``contents`` the contents."""

    def values(self, contents: Any) -> Iterable[object]:
        """Objects inside ``contents``, to be looked at next."""
        return contents if isinstance(contents, tuple) else ()


class _Dict(Holder):
    """The entries of a dict, or those of some names."""

    def __init__(self, held: dict[Any, Any], names: tuple[str, ...] | None = None) -> None:
        self._held = held
        self._names = names
        self._type: Any = OrderedDict if isinstance(held, OrderedDict) else dict  # subclasses may do more

    def read(self) -> Any:
        if self._names is None:
            return tuple(self._type.keys(self._held)), tuple(self._type.values(self._held))
        names = tuple(name for name in self._names if name in self._held)
        return names, tuple(self._held[name] for name in names)

    def write(self, contents: Any) -> None:
        old, _ = self.read()
        names, values = contents
        if old != names:  # in this order too
            for name in old:
                self._type.__delitem__(self._held, name)
        for name, value in zip(names, values, strict=True):
            self._type.__setitem__(self._held, name, value)

    def values(self, contents: Any) -> Iterable[object]:
        values: tuple[object, ...] = contents[1]
        return values


class _Cell(Holder):
    """A variable that a function uses of a function around it."""

    def __init__(self, cell: CellType) -> None:
        self.cell = cell

    def read(self) -> Any:
        try:
            return (self.cell.cell_contents,)
        except ValueError:  # it has none yet
            return ()

    def write(self, contents: Any) -> None:
        if contents:
            self.cell.cell_contents = contents[0]


class _Calls(Holder):
    """Contents that are read and written by two calls."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any], *, has_items: bool = False) -> None:
        self._read = read
        self._write = write
        self._has_items = has_items

    def read(self) -> Any:
        return self._read()

    def write(self, contents: Any) -> None:
        self._write(contents)

    def values(self, contents: Any) -> Iterable[object]:
        return contents if self._has_items else ()


def dict_holder(held: dict[Any, Any]) -> Holder:
    """A holder of all entries of ``held``."""
    return _Dict(held)


def slots_holder(value: object) -> Holder | None:
    """A holder of the attributes of ``value`` that are slots of its class; None if there are none."""
    slots = _slots(type(value))
    return _attributes(slots, partial(getattr, value), partial(object.__setattr__, value)) if slots else None


def _attributes(names: tuple[str, ...], get: Callable[[str, Any], Any], put: Callable[[str, Any], None]) -> Holder:
    """A holder of attributes of an object; those that it lacks stay as they are."""

    def write(contents: Any) -> None:
        for name, value in zip(names, contents, strict=True):
            if value is not _MISSING:
                put(name, value)

    return _Calls(lambda: tuple(get(name, _MISSING) for name in names), write, has_items=True)


def holder_of(value: Any) -> Holder | None:
    """A holder of what is inside ``value``; None if it is no container, generator or array that is known."""
    if isinstance(value, dict):
        return _Dict(value)
    if isinstance(value, list):
        return _Calls(lambda: tuple(value), partial(list.__setitem__, value, slice(None)), has_items=True)
    if isinstance(value, (set, deque)):
        return _Calls(lambda: tuple(value), partial(_refill, value), has_items=True)
    if isinstance(value, bytearray):
        return _Calls(lambda: bytes(value), partial(value.__setitem__, slice(None)))
    if isinstance(value, torch.Generator):
        return _Calls(value.get_state, value.set_state)
    if isinstance(value, random.Random):
        return _Calls(value.getstate, value.setstate)
    if isinstance(value, np.random.Generator):
        return _Calls(lambda: value.bit_generator.state, lambda state: setattr(value.bit_generator, "state", state))
    if isinstance(value, np.random.RandomState):
        return _Calls(value.get_state, value.set_state)
    if isinstance(value, np.ndarray) and value.flags.writeable and value.nbytes <= MAX_ARRAY_NBYTES:
        return _Calls(value.copy, partial(np.copyto, value))
    return None


def _refill(held: Any, contents: tuple[Any, ...]) -> None:
    held.clear()
    (held.update if isinstance(held, set) else held.extend)(contents)


def surroundings(module: nn.Module) -> list[Holder]:
    """Holders of the variables that the code of ``module`` and its children uses from outside.

    These are globals, variables of functions around, and attributes of classes.
    """
    found: dict[tuple[int, str], Holder] = {}
    waiting: list[FunctionType] = []
    seen: set[int] = set()
    for cls in {cls for m in module.modules() for cls in type(m).__mro__ if not is_foreign(cls)}:
        functions, others = [], []
        for name, value in vars(cls).items():
            inner = getattr(value, "__func__", value)
            if isinstance(inner, FunctionType):
                functions.append(inner)
            elif not name.startswith("__") and not hasattr(value, "__get__"):
                others.append(name)
        waiting += functions
        if others:
            found[id(cls), ""] = _attributes(tuple(others), vars(cls).get, partial(setattr, cls))
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for name in _global_names(function.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, FunctionType):
                waiting += [value] * (value.__module__ == function.__module__)
            elif not isinstance(value, (type, type(sys))) and name in function.__globals__:
                found[id(function.__globals__), name] = _Dict(function.__globals__, (name,))
        for cell in cells_of(function):
            found[id(cell.cell), ""] = cell
    return list(found.values())


def is_foreign(cls: type) -> bool:
    """Whether ``cls`` is of a library whose objects do not change in a forward but by calls that are known."""
    return cls.__module__.partition(".")[0] in _FOREIGN


def _slots(cls: type) -> tuple[str, ...]:
    names = (getattr(c, "__slots__", ()) for c in cls.__mro__ if "__slots__" in vars(c))
    flat = [n for some in names for n in ((some,) if isinstance(some, str) else some)]
    return tuple(n for n in flat if n not in ("__dict__", "__weakref__"))


def parts_of(value: Any) -> Iterable[object]:
    """What a function, a method or a `functools.partial` refers to, but for the variables around it."""
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    return () if _is_foreign_function(value) else (value.__defaults__ or (), value.__kwdefaults__ or {})


def cells_of(value: Any) -> list[_Cell]:
    """The variables from outside that a function uses, as holders; none of code that is not the user's."""
    if not isinstance(value, FunctionType) or _is_foreign_function(value):
        return []
    return [_Cell(cell) for cell in value.__closure__ or ()]


def _is_foreign_function(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] in _FOREIGN


def _global_names(code: CodeType) -> set[str]:
    inner = (_global_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*inner)
