"""What Python objects hold that a forward may change: seen, compared, and put back for a second run.

[Note: Python state] Before a block runs, everything that can be reached from its arguments and from itself is noted:
dicts, lists, sets, attributes of objects, variables that its functions use from outside, generators. For the second run
they hold again what they held then, and afterwards what they held before it. Tensors are noted by version only: one
that is changed in place cannot be put back. What cannot be looked into (an iterator), or is too much, is called opaque.
"""

from __future__ import annotations

import random
import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import is_
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_OBJECTS = 20_000
"""More than these are not looked at."""

MAX_ARRAY_NBYTES = 1 << 20
"""NumPy arrays up to this size are copied; larger ones are opaque if they can be written."""

_ATOMS = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device, torch.Size)
_FOREIGN = (sys.stdlib_module_names - {"collections", "types"}) | {
    "lightning",
    "lightning_fabric",
    "lightning_ssd",
    "numpy",
    "pytorch_lightning",
    "torch",
}
_HOOKS = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
_MISSING = object()

Change = Callable[[Tensor], object]


class PythonState:
    """What is reached from some roots; see [Note: Python state].

    Args:
        roots: Where to start; not themselves held.
        around: What else is looked at: variables outside, see `surroundings`.

    Attributes:
        opaque: What cannot be looked into, in words; None if all can.
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
        """Replace tensors that are held by what ``change`` makes of them."""

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
        """Whether a tensor was changed in place."""
        return any(t._version != version for t, version in self._tensors)

    @contextmanager
    def put_back(self, load: Callable[[object], object] | None = None) -> Iterator[None]:
        """Inside, everything holds what it held, as made by ``load``; afterwards what it held before."""
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
            waiting.extend(_parts(value))
            for holder in _cells(value):
                self._note(holder, waiting)
        else:
            self._look_at_object(value, waiting)

    def _look_at_module(self, module: nn.Module, waiting: list[object]) -> None:
        attributes = vars(module)
        self._note(_Dict(attributes), [])
        for name, value in attributes.items():
            if name == "_buffers" and isinstance(value, dict):  # their values are the frame's matter
                self._note(_Dict(value), [])
            elif name not in _HOOKS or value:
                waiting.append(value)

    def _look_at_object(self, value: object, waiting: list[object]) -> None:
        holder = _holder(value)
        if holder is not None:
            self._note(holder, waiting)
        elif isinstance(value, Iterator):
            self.opaque = self.opaque or f"an iterator ({type(value).__name__})"
        elif isinstance(value, np.ndarray) and value.flags.writeable:
            self.opaque = self.opaque or "a large NumPy array"
        if _is_foreign(type(value)):
            return
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._note(_Dict(attributes), waiting)
        slots = _slots(type(value))
        if slots:
            self._note(_Slots(value, slots), waiting)

    def _note(self, holder: Holder, waiting: list[object]) -> None:
        contents = holder.read()
        self._holders.append((holder, contents))
        waiting.extend(holder.values(contents))


def surroundings(module: nn.Module) -> list[Holder]:
    """Variables outside of ``module`` and its children that their code uses: globals, closures, of classes."""
    found: dict[tuple[int, str], Holder] = {}
    waiting: list[FunctionType] = []
    seen: set[int] = set()
    for cls in {cls for m in module.modules() for cls in type(m).__mro__ if not _is_foreign(cls)}:
        functions, others = [], []
        for name, value in vars(cls).items():
            inner = getattr(value, "__func__", value)
            if isinstance(inner, FunctionType):
                functions.append(inner)
            elif not name.startswith("__") and not hasattr(value, "__get__"):
                others.append(name)
        waiting += functions
        if others:
            found[id(cls), ""] = _Class(cls, tuple(others))
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, FunctionType):
                waiting += [value] * (value.__module__ == function.__module__)
            elif not isinstance(value, (type, type(sys))) and name in function.__globals__:
                found[id(function.__globals__), name] = _Dict(function.__globals__, (name,))
        for cell in _cells(function):
            found[id(cell.cell), ""] = cell
    return list(found.values())


def mapped(value: Any, kind: type[Any] | tuple[type[Any], ...], change: Callable[[Any], Any]) -> Any:
    """``value`` with everything of ``kind`` inside nested plain tuples changed."""
    if type(value) is tuple:
        return tuple(mapped(item, kind, change) for item in value)
    return change(value) if isinstance(value, kind) else value


# -- holders -----------------------------------------------------------------------------------------------------


class Holder:
    """Something whose contents can be read and written. Contents are a tuple, or one value."""

    def read(self) -> Any:
        """The contents now."""
        raise NotImplementedError

    def write(self, contents: Any) -> None:
        """Make ``contents`` the contents."""
        raise NotImplementedError

    def values(self, contents: Any) -> Iterable[object]:
        """What is reached from here."""
        return contents if isinstance(contents, tuple) else ()


class _Dict(Holder):
    """A dict, or some of its names."""

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


class _Class(Holder):
    """Attributes of a class."""

    def __init__(self, cls: type, names: tuple[str, ...]) -> None:
        self._cls = cls
        self._names = names

    def read(self) -> Any:
        return tuple(vars(self._cls).get(name, _MISSING) for name in self._names)

    def write(self, contents: Any) -> None:
        for name, value in zip(self._names, contents, strict=True):
            if value is not _MISSING:
                setattr(self._cls, name, value)


class _Slots(Holder):
    """Attributes of an object that are not in a dict."""

    def __init__(self, held: object, names: tuple[str, ...]) -> None:
        self._held = held
        self._names = names

    def read(self) -> Any:
        return tuple(getattr(self._held, name, _MISSING) for name in self._names)

    def write(self, contents: Any) -> None:
        for name, value in zip(self._names, contents, strict=True):
            if value is not _MISSING:
                object.__setattr__(self._held, name, value)


class _Cell(Holder):
    """A variable of a function around."""

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
    """What is read and written by calls."""

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


def _holder(value: Any) -> Holder | None:
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


def _change(holder: Holder, now: Any, contents: Any) -> None:
    """Make ``contents`` of what has ``now``."""
    if not _is_same(now, contents):
        holder.write(contents)


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not tuple or type(b) is not tuple or len(a) != len(b):
        return False
    return all(map(is_, a, b)) or all(map(_is_same, a, b))  # the first is fast


# -- parts of things ---------------------------------------------------------------------------------------------


class _Detached:
    """A tensor with history: holding it here would keep the graphs of all past steps in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._values = tensor.detach()

    def tensor(self) -> Tensor:
        """The tensor, or one with the same values."""
        live = self._tensor()
        # Autocast caches casts of leaves: what was none must not become one.
        return live if live is not None else self._values.detach().requires_grad_().view_as(self._values)


def _watch(tensor: Tensor) -> Tensor:
    """One that has the version of ``tensor``, and not its memory where that can be."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return tensor.detach()
    with torch.no_grad():
        watcher = tensor.detach()
        watcher.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return watcher


def _detached(tensor: Tensor) -> object:
    return tensor if tensor.is_leaf else _Detached(tensor)


def _is_foreign(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _FOREIGN


def _slots(cls: type) -> tuple[str, ...]:
    names = (getattr(c, "__slots__", ()) for c in cls.__mro__ if "__slots__" in vars(c))
    flat = [n for some in names for n in ((some,) if isinstance(some, str) else some)]
    return tuple(n for n in flat if n not in ("__dict__", "__weakref__"))


def _parts(value: Any) -> Iterable[object]:
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    return () if _is_foreign_function(value) else (value.__defaults__ or (), value.__kwdefaults__ or {})


def _cells(value: Any) -> list[_Cell]:
    if not isinstance(value, FunctionType) or _is_foreign_function(value):
        return []
    return [_Cell(cell) for cell in value.__closure__ or ()]


def _is_foreign_function(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] in _FOREIGN


def _names(code: CodeType) -> set[str]:
    inner = (_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*inner)
