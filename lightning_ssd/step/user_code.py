"""What code of the user's mentions: read from compiled functions, by names, without running them."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType


def functions_used(
    kind: type, method: str, *, on_object: object = None, besides: tuple[str, ...] = ()
) -> Iterator[object]:
    """Functions of the user's that ``method`` of ``kind`` may call, itself among them; found by their names.

    Args:
        kind: The class.
        method: Its name.
        on_object: What one object of the class has in the method's place, if it has anything.
        besides: Fronts of names of modules whose code is not the user's, beside torch's.
    """
    others = ("torch.", "builtins", *besides)
    own = [base for base in kind.__mro__ if _is_users(base, others)]
    waiting, seen = [*_functions_of(own, method), on_object], set[int]()
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield function
        names = names_in(function)
        around = getattr(function, "__globals__", {})
        outside = [value for value in map(around.get, names) if isinstance(value, (FunctionType, type))]
        theirs = [value for value in outside if _is_users(value, others)]
        kinds = [*own, *(value for value in theirs if isinstance(value, type))]
        waiting += [value for value in theirs if not isinstance(value, type)]
        waiting += [found for name in names for found in _functions_of(kinds, name)]


def names_in(function: object) -> list[str]:
    """Names that a Python function uses, and those inside it do; none of anything else."""
    names: list[str] = []
    codes = [getattr(function, "__code__", function)]
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            names += code.co_names
            codes += code.co_consts
    return names


def _is_users(value: FunctionType | type, others: tuple[str, ...]) -> bool:
    return not (value.__module__ or "").startswith(others)


def _functions_of(kinds: list[type], name: str) -> Iterator[object]:
    """What ``kinds`` themselves have by this name, without what makes it a method."""
    for found in (vars(kind)[name] for kind in kinds if name in vars(kind)):
        yield found.fget if isinstance(found, property) else getattr(found, "__func__", found)
