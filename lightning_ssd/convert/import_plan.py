"""What an imported checkpoint holds: which unit files are linked, which are written, and from which tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_ssd.checkpoint.state_dict import VALUE_KINDS
from lightning_ssd.checkpoint.unit_file import ComposedFile, UnitFile
from lightning_ssd.checkpoint.writer import lay_out
from lightning_ssd.convert.match import Shape
from lightning_ssd.convert.sources import ImportSource, TensorRef
from lightning_ssd.sizes import GiB
from lightning_ssd.store.safetensors_header import ITEMSIZE

_FILE_NBYTES = 1 * GiB


@dataclass(frozen=True)
class Place:
    """Where a tensor of the target comes from: the source, or the model checkpoint; and its name there."""

    source: ImportSource
    name: str


class ImportPlan:
    """What the target holds.

    Attributes:
        names: Name in the source -> name in the target, of parameters that come from the source.
        buffers: Tensors that are no parameters, by name in the target.
        aliases: Further names of tied tensors.
    """

    def __init__(self, source: ImportSource, like: ImportSource | None, places: Mapping[str, Place]) -> None:
        self._like = like
        self.aliases = _aliases(source, like, places)
        self.buffers: dict[str, TensorRef] = {}
        self.names: dict[str, str] = {}
        self._params: dict[str, dict[str, TensorRef]] = {}
        self._origins: dict[str, Place] = {}
        for name, place in places.items():
            if name not in self.aliases:
                self._add(name, place)

    def files(self, *, with_state: bool) -> list[UnitFile | ComposedFile]:
        """Unit files: links where all of one is wanted, new ones for the others."""
        wanted = {
            (name, kind): ref
            for name, kinds in self._params.items()
            for kind, ref in kinds.items()
            if with_state or kind in VALUE_KINDS
        }
        linked = self._linked(wanted)
        done = {(entry.name, file.kind) for file in linked for entry in file.entries}
        rest = {key: ref for key, ref in wanted.items() if key not in done}
        like = self._like.shapes if self._like is not None else {}
        shapes = {name: like.get(name, next(iter(kinds.values())).shape) for name, kinds in self._params.items()}
        return [*linked, *_composed(rest, shapes)]

    def dtypes(self, files: Iterable[UnitFile | ComposedFile]) -> dict[str, str]:
        """Parameters' own dtypes, where their origin tells them."""
        there = {entry.name for file in files for entry in file.entries}
        found: dict[str, str] = {}
        for name, place in self._origins.items():
            reader = self._like.reader if self._like is not None else place.source.reader
            known = name if self._like is not None else place.name
            if reader is not None and name in there and known in reader.manifest.dtypes:
                found[name] = reader.manifest.dtypes[known]
        return found

    def _add(self, name: str, place: Place) -> None:
        old = place.source.aliases.get(place.name, place.name)
        is_buffer = old in place.source.buffers if self._like is None else name in self._like.buffers
        if is_buffer:
            self.buffers[name] = place.source.value(old)
            return
        kinds = place.source.parameters.get(old) or {"param": place.source.buffers[old]}
        missing = place.source is self._like
        like = None if self._like is None else self._like.reader
        is_16_bit = like is not None and like.manifest.dtypes.get(name) in ("BF16", "F16")
        if is_16_bit and "master" not in kinds and kinds["param"].dtype == "F32":
            kinds = {"master" if kind == "param" else kind: ref for kind, ref in kinds.items()}
        self._params[name] = {k: ref for k, ref in kinds.items() if not missing or k in VALUE_KINDS}
        self._origins[name] = place
        if not missing:
            self.names[old] = name

    def _linked(self, wanted: Mapping[tuple[str, str], TensorRef]) -> list[UnitFile]:
        files: dict[str, dict[str, str]] = defaultdict(dict)  # path -> name inside the target -> name in the source
        places = {}
        for (name, _), ref in wanted.items():
            reader = self._origins[name].source.reader
            if ref.place is not None and reader is not None:
                path = reader.path_of(ref.place[0])
                places[path] = ref.place[0], reader
                files[path][name] = ref.place[1].name
        found = []
        for path, names in files.items():
            record, reader = places[path]
            # The file cannot be linked if one of its tensors has two names in the target, or none.
            if sorted(names.values()) == sorted(entry.name for entry in record.entries):
                new = {old: name for name, old in names.items()}
                entries = tuple(replace(e, name=new[e.name]) for e in record.entries)
                inside = {new[e.name]: record.renamed.get(e.name, e.name) for e in record.entries}
                renamed = {name: old for name, old in inside.items() if name != old}
                where = (record.checksums, record.data_begin, renamed, reader.folder_of(record))
                file = UnitFile(record.unit, record.kind, path, True, entries, *where)
                found.append(file)
        return found


def _aliases(source: ImportSource, like: ImportSource | None, places: Mapping[str, Place]) -> dict[str, str]:
    if like is not None:
        return dict(like.aliases)
    new = {place.name: name for name, place in places.items()}
    found: dict[str, str] = {}
    families: dict[str, str] = {}
    for old, name in new.items():
        stored = source.aliases.get(old, old)
        # The map may leave out the stored name: then the first of the tied names stores the tensor.
        first = families.setdefault(stored, new.get(stored, name))
        if first != name:
            found[name] = first
    return found


def _composed(wanted: Mapping[tuple[str, str], TensorRef], shapes: Mapping[str, Shape]) -> list[ComposedFile]:
    """Files of up to 1 GiB, one kind each, in order."""
    groups: dict[str, list[dict[str, TensorRef]]] = defaultdict(lambda: [{}])
    filled: dict[str, int] = defaultdict(int)
    for (name, kind), ref in wanted.items():
        nbytes = math.prod(ref.shape) * ITEMSIZE[ref.dtype]
        if groups[kind][-1] and filled[kind] + nbytes > _FILE_NBYTES:
            groups[kind].append({})
            filled[kind] = 0
        groups[kind][-1][name] = ref
        filled[kind] += nbytes
    return [
        _Group(group, shapes).file(f"imported-{index}", kind)
        for kind, found in groups.items()
        for index, group in enumerate(found)
    ]


@dataclass(frozen=True)
class _Group:
    """Tensors of one new file, by name in the target, in the shapes that the target gives them."""

    refs: Mapping[str, TensorRef]
    shapes: Mapping[str, Shape]

    def tensor(self, name: str) -> Tensor:
        return self.refs[name].load().reshape(self.shapes[name])

    def drop(self, name: str) -> None:
        self.refs[name].drop()

    def file(self, unit: str, kind: str) -> ComposedFile:
        entries = lay_out((name, ref.dtype, self.shapes[name]) for name, ref in self.refs.items())
        return ComposedFile(unit, kind, entries, self)
