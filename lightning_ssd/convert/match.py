"""Which tensor of a source belongs to which name of a model. Pure: names and shapes in, names out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

_MAX_CANDIDATES = 8


@dataclass(frozen=True)
class Match:
    """Which tensor of a source belongs to which name of a model.

    Attributes:
        sources: Name wanted -> name in the source, where the shapes agree.
        missing: Names wanted that the source does not have.
        unexpected: Names of the source that are not wanted.
        mismatched: Name wanted -> (shape wanted, shape in the source).
    """

    sources: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, tuple[Shape, Shape]]


def match(
    wanted: Mapping[str, Shape],
    found: Mapping[str, Shape],
    *,
    tied: Mapping[str, str] | None = None,
    by_prefix: bool = True,
) -> Match:
    """Find each wanted name in a source, whose names may all have another prefix.

    Args:
        wanted: Names and shapes of the model.
        found: Names and shapes of the source.
        tied: Wanted name -> wanted name of the same tensor; either of them in the source serves both.
        by_prefix: Exchange one prefix for another where most names and shapes agree then; False compares whole names.
    """
    to_source = _best_prefixes(wanted, found) if by_prefix else _Prefixes("", "")
    families: dict[str, list[str]] = {}
    for alias, stored in (tied or {}).items():
        family = families.setdefault(stored, [stored])
        family.append(alias)
        families[alias] = family
    sources: dict[str, str] = {}
    missing: list[str] = []
    mismatched: dict[str, tuple[Shape, Shape]] = {}
    used: set[str] = set()
    for name, shape in wanted.items():
        source = next(
            (s for n in (name, *families.get(name, ())) if (s := to_source(n)) is not None and s in found), None
        )
        if source is None:
            missing.append(name)
            continue
        used.add(source)
        if found[source] == shape:
            sources[name] = source
        else:
            mismatched[name] = (shape, found[source])
    return Match(sources, tuple(missing), tuple(name for name in found if name not in used), mismatched)


def _best_prefixes(wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> _Prefixes:
    fronts: dict[tuple[str, Shape], list[str]] = {}
    for name, shape in found.items():
        for front, rest in _splits(name):
            fronts.setdefault((rest, shape), []).append(front)
    votes = Counter({_Prefixes("", ""): 0})
    for name, shape in wanted.items():
        for here, rest in _splits(name):
            candidates = fronts.get((rest, shape), ())
            # A rest as common as "weight" says nothing about the front, and would cost the square of the names.
            if len(candidates) <= _MAX_CANDIDATES:
                votes.update(_Prefixes(here, there) for there in candidates)
    best = max(votes.values())
    # Of equally good ones the shortest: no prefix at all if that explains as much.
    return min((r for r, n in votes.items() if n == best), key=lambda r: (len(r.here + r.there), r.here, r.there))


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a name before one of its parts: a front that is empty or ends with a dot, and the rest."""
    position = 0
    while True:
        yield name[:position], name[position:]
        position = name.find(".", position) + 1
        if not position:
            return


@dataclass(frozen=True)
class _Prefixes:
    """Wanted names begin with ``here`` where those of the source begin with ``there``."""

    here: str
    there: str

    def __call__(self, name: str) -> str | None:
        return self.there + name[len(self.here) :] if name.startswith(self.here) else None
