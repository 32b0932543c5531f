"""Whether a module may write to its parameters in its forward by ``.data``, which no version tells."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn


def may_write(module: nn.Module, known: dict[type[nn.Module], bool]) -> bool:
    """Whether a forward of ``module`` or its children, or a hook on it, mentions ``.data``: it may write to parameters.

    Or code of the user's that it uses. torch's own forwards do so by operations on the parameter itself only.

    Args:
        module: What runs.
        known: Answers for classes; added to.
    """
    for inner in module.modules():
        kind = type(inner)
        if kind not in known:
            known[kind] = any("data" in _names(function) for function in _used_by_forward(kind))
        hooks = (*inner._forward_pre_hooks.values(), *inner._forward_hooks.values())
        if known[kind] or any("data" in _names(function) for function in hooks):
            return True
    return False


def _used_by_forward(kind: type[nn.Module]) -> Iterator[object]:
    """Functions of the user's that a forward of ``kind`` may call, itself among them; found by their names."""
    own = [base for base in kind.__mro__ if _is_users(base)]
    waiting, seen = list(_functions_of(own, "forward")), set[int]()
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield function
        names = _names(function)
        around = getattr(function, "__globals__", {})
        outside = [value for value in map(around.get, names) if isinstance(value, (FunctionType, type))]
        theirs = [value for value in outside if _is_users(value)]
        kinds = [*own, *(value for value in theirs if isinstance(value, type))]
        waiting += [value for value in theirs if not isinstance(value, type)]
        waiting += [found for name in names for found in _functions_of(kinds, name)]


def _is_users(value: FunctionType | type) -> bool:
    return not (value.__module__ or "").startswith(("torch.", "builtins"))


def _functions_of(kinds: list[type], name: str) -> Iterator[object]:
    """What ``kinds`` themselves have by this name, without what makes it a method."""
    for found in (vars(kind)[name] for kind in kinds if name in vars(kind)):
        yield found.fget if isinstance(found, property) else getattr(found, "__func__", found)


def _names(function: object) -> list[str]:
    """Names that a Python function uses, and those inside it do; none of anything else."""
    names: list[str] = []
    codes = [getattr(function, "__code__", function)]
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            names += code.co_names
            codes += code.co_consts
    return names
