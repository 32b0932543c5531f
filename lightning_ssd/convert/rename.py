"""Rules by which the parameters of one model get the names of another: names in, names out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.safe_open import open_regular
from lightning_ssd.store.safetensors_header import parse_json_object

_MAX_NBYTES = 64 * 1024 * 1024


class Renaming:
    """Old name -> new name.

    Rules are pairs ``"old.name": "new.name"``; ``"front.*": "other.*"`` exchanges the front of every name that begins
    so; null in place of the new name leaves the tensor out. A whole name takes precedence over a front, a longer front
    over a shorter one. Names without a rule stay.
    """

    def __init__(self, rules: Mapping[str, object], where: str = "the map") -> None:
        """Check the rules.

        Raises:
            CheckpointError: If a rule is of another form.
        """
        self.where = where
        self._whole: dict[str, str | None] = {}
        self._fronts: dict[str, str | None] = {}
        self._used: set[str] = set()
        for old, new in rules.items():
            if new is not None and not isinstance(new, str):
                raise CheckpointError(f"{where}: {old!r} leads to {str(new)!r:.80}, not to a name or null")
            is_front = old.endswith("*")
            if "*" in old[:-1] or (new is not None and (new.endswith("*") != is_front or "*" in new[:-1])):
                raise CheckpointError(f"{where}: {old!r}: {new!r}: a * stands at the end of both sides, or of none")
            if is_front:
                self._fronts[old[:-1]] = None if new is None else new[:-1]
            else:
                self._whole[old] = new

    def __bool__(self) -> bool:
        return bool(self._whole or self._fronts)

    def __call__(self, name: str) -> str | None:
        """The new name, None if the tensor is left out."""
        if name in self._whole:
            self._used.add(name)
            return self._whole[name]
        fronts = [front for front in self._fronts if name.startswith(front)]
        if not fronts:
            return name
        front = max(fronts, key=len)
        self._used.add(front + "*")
        new = self._fronts[front]
        return None if new is None else new + name[len(front) :]

    def apply(self, names: Iterable[str]) -> dict[str, str | None]:
        """Old -> new name of all ``names``.

        Raises:
            CheckpointError: If a rule matches none of them, or two would get the same name.
        """
        found = {name: self(name) for name in names}
        unused = [rule for rule in (*self._whole, *(f"{front}*" for front in self._fronts)) if rule not in self._used]
        if unused:
            raise CheckpointError(f"{self.where}: no tensor is called {', '.join(map(repr, unused[:8]))}")
        first: dict[str, str] = {}
        for old, new in found.items():
            if new is not None and first.setdefault(new, old) != old:
                raise CheckpointError(f"{self.where}: both {first[new]!r} and {old!r} would be called {new!r}")
        return found


def read_renaming(path: str | os.PathLike[str]) -> Renaming:
    """Read rules from a JSON file that holds one object.

    Raises:
        CheckpointError: If it cannot be read, or is malformed.
    """
    where = os.fspath(path)
    try:
        with open_regular(where, where) as file:
            text = file.read(_MAX_NBYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read the map {where!r}: {error.strerror}") from error
    return Renaming(parse_json_object(text, where), where)
