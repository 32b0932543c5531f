"""Make a checkpoint of ours from another format, or from one of ours for a model with other parameter names.

Tensors are copied one at a time from the source's mapped files. Where the source is a checkpoint of ours, a unit file
is linked if every tensor in it is wanted. Without a *model checkpoint* the target holds what the source holds. A model
checkpoint is one that the new model saved, at any step (``like``): from it come names, shapes, optimizer groups, and
the values of parameters that the source does not have.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from lightning_ssd.checkpoint.directory import is_checkpoint
from lightning_ssd.checkpoint.save import write_checkpoint
from lightning_ssd.checkpoint.state_dict import OPTIMIZER_PREFIX, STATE_DICT_EXTRA, VALUE_KINDS
from lightning_ssd.checkpoint.unit_file import ComposedFile, UnitFile
from lightning_ssd.checkpoint.writer import Progress, lay_out
from lightning_ssd.convert.dcp import is_dcp, open_dcp
from lightning_ssd.convert.deepspeed import is_universal, open_universal
from lightning_ssd.convert.import_optimizer import optimizers_for
from lightning_ssd.convert.match import Shape, match
from lightning_ssd.convert.rename import Renaming
from lightning_ssd.convert.sources import (
    ImportSource,
    TensorRef,
    open_checkpoint,
    open_torch_file,
)
from lightning_ssd.convert.weight_files import open_weight_files
from lightning_ssd.errors import CheckpointError
from lightning_ssd.sizes import GiB
from lightning_ssd.store.safetensors_header import ITEMSIZE

_FILE_NBYTES = 1 * GiB
_KEPT_WITH_WEIGHTS = ("hyper_parameters", "hparams_name", STATE_DICT_EXTRA)


@dataclass
class ImportReport:
    """What was, or would be, imported.

    Attributes:
        source: Where from.
        matched: How many of the model's tensors the source has.
        renamed: Name in the source -> name in the target, where they differ.
        missing: Names of the model that the source does not have; their values come from the model checkpoint.
        left_over: Names of the source that the model does not have, or that the map leaves out.
        optimizers: Whether optimizer state is imported: ``"imported"``, ``"fresh"`` or ``"none"``.
        step: Global step of the target.
        nbytes_linked: Bytes of unit files that are links.
        nbytes_written: Bytes written.
    """

    source: str
    matched: int
    renamed: dict[str, str]
    missing: list[str]
    left_over: list[str]
    optimizers: str = "none"
    step: int = 0
    nbytes_linked: int = 0
    nbytes_written: int = 0


@dataclass
class ImportOptions:
    """How to import.

    Attributes:
        renaming: Rules for names.
        like: A checkpoint that the model saved.
        partial: Take what is missing from ``like``, and leave out what is left over, instead of refusing.
        weights_only: Leave optimizer state and Lightning's state behind.
        trust: Unpickle classes that the source names, which runs its code.
        step: Optimizer steps of the source's state, where it does not hold them.
        dry_run: Report only; write nothing.
    """

    renaming: Renaming = field(default_factory=lambda: Renaming({}))
    like: str | None = None
    partial: bool = False
    weights_only: bool = False
    trust: bool = False
    step: int | None = None
    dry_run: bool = False


def import_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: ImportOptions | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Import a checkpoint.

    Args:
        source: A Hugging Face folder, a ``.safetensors`` file, a plain ``.ckpt`` or other torch file, a folder of
            ``torch.distributed.checkpoint``, a DeepSpeed universal checkpoint, or a checkpoint of ours.
        target: The new checkpoint's directory; must not exist, or be empty.
        options: How to import; the defaults of `ImportOptions` if None.
        progress: Called with bytes done and bytes in all.

    Raises:
        CheckpointError: If source and model do not fit, or the source is not what it should be. Nothing was written.
    """
    options = options or ImportOptions()
    to = os.path.abspath(os.fspath(target))
    if os.path.lexists(to) and not (os.path.isdir(to) and not os.listdir(to)):
        raise CheckpointError(f"{to!r} exists; name a directory that does not exist or is empty")
    with ExitStack() as stack:
        found = stack.enter_context(open_source(source, trust=options.trust))
        like = None if options.like is None else stack.enter_context(open_checkpoint(options.like))
        if options.weights_only:
            _leave_weights(found)
        places, report = _pair(found, like, options)
        job = _Job(found, like, places)
        records, extra = optimizers_for(found, like, job.names, options.step)
        report.optimizers = "none" if not records else "imported" if found.optimizers else "fresh"
        state = _lightning_state(found, has_optimizers=bool(records))
        report.step = int(state.get("global_step", 0))
        if options.dry_run:
            return report
        files = job.files(with_state=bool(records))
        if any(isinstance(file, ComposedFile) for file in files):  # a link keeps its checksums
            _verify(found, None if records else VALUE_KINDS)
            _verify(like, VALUE_KINDS)
        buffers = {name: ref.load() for name, ref in job.buffers.items()}
        for index, name, key, value in extra:
            buffers[f"{OPTIMIZER_PREFIX}{index}.{name}.{key}"] = value
        done = write_checkpoint(
            to, files, buffers, state, records, step=report.step, dtypes=job.dtypes(files), aliases=job.aliases,
            progress=progress,
        )  # fmt: skip
    report.nbytes_linked, report.nbytes_written = done.nbytes_linked, done.nbytes_written
    return report


def open_source(path: str | os.PathLike[str], *, trust: bool = False) -> ImportSource:
    """Open a source of any known format; see `import_checkpoint`.

    Raises:
        CheckpointError: If the format is unknown, or the source is malformed.
    """
    name = os.path.abspath(os.fspath(path))
    if is_checkpoint(name):
        return open_checkpoint(name, weights_only=not trust)
    if is_dcp(name):
        return open_dcp(name, weights_only=not trust)
    if is_universal(name):
        return open_universal(name, weights_only=not trust)
    if os.path.lexists(name) and not os.path.isdir(name) and not name.endswith(".safetensors"):
        return open_torch_file(name, weights_only=not trust)
    return open_weight_files(name)


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the target comes from: the source, or the model checkpoint; and its name there."""

    source: ImportSource
    name: str


def _verify(source: ImportSource | None, kinds: Collection[str] | None) -> None:
    if source is not None and source.reader is not None:
        source.reader.verify_files(kinds=kinds)


def _leave_weights(source: ImportSource) -> None:
    source.optimizers, source.extra_state = [], {}
    source.state = {k: v for k, v in source.state.items() if k in _KEPT_WITH_WEIGHTS}
    for kinds in source.parameters.values():
        for kind in [kind for kind in kinds if kind not in VALUE_KINDS]:
            del kinds[kind]


def _pair(
    source: ImportSource, like: ImportSource | None, options: ImportOptions
) -> tuple[dict[str, _Place], ImportReport]:
    """Find for each name of the target where its tensor comes from.

    Raises:
        CheckpointError: If shapes disagree, or names are missing or left over without ``partial``.
    """
    shapes = source.shapes
    new_names = options.renaming.apply(shapes)
    dropped = [old for old, new in new_names.items() if new is None]
    old_names = {new: old for old, new in new_names.items() if new is not None}
    if like is None:
        _refuse_flat(source)
        renamed = {old: new for new, old in old_names.items() if new != old}
        report = ImportReport(source.where, len(old_names), renamed, [], dropped)
        return {new: _Place(source, old) for new, old in old_names.items()}, report
    wanted = like.shapes
    found = {new: _shape(source, old, wanted.get(new)) for new, old in old_names.items()}
    matched = match(wanted, found, tied=like.aliases, by_prefix=not options.renaming)
    _refuse_faults(matched.mismatched, matched.missing, matched.unexpected, source.where, partial=options.partial)
    places = {name: _Place(source, old_names[new]) for name, new in matched.sources.items()}
    places |= {name: _Place(like, name) for name in matched.missing}
    renamed = {place.name: name for name, place in places.items() if place.source is source and place.name != name}
    left_over = dropped + [old_names[new] for new in matched.unexpected]
    return places, ImportReport(source.where, len(matched.sources), renamed, list(matched.missing), left_over)


def _shape(source: ImportSource, name: str, wanted: Shape | None) -> Shape:
    ref = source.value(name)
    fits = ref.is_flat and wanted is not None and math.prod(wanted) == math.prod(ref.shape)
    return wanted if fits and wanted is not None else ref.shape


def _refuse_flat(source: ImportSource) -> None:
    flat = [name for name in source.parameters if source.value(name).is_flat]
    if flat:
        raise CheckpointError(
            f"{source.where}: {flat[0]!r} and {len(flat) - 1} more are stored flat, without their shapes (as DeepSpeed "
            "ZeRO stage 3 does); name a checkpoint that the model saved with --like"
        )


def _refuse_faults(
    mismatched: Mapping[str, tuple[Shape, Shape]],
    missing: Iterable[str],
    unexpected: Iterable[str],
    where: str,
    *,
    partial: bool,
) -> None:
    faults = [f"{n!r} is {list(have)} there, the model's is {list(want)}" for n, (want, have) in mismatched.items()]
    if not partial:
        faults += [f"{name!r} is missing there" for name in missing]
        faults += [f"{name!r} of it is unknown to the model" for name in unexpected]
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        way_out = "exchange names with --map" + ("" if partial or mismatched else ", or accept it with --partial")
        raise CheckpointError(f"{where} does not fit the model: {'; '.join(faults[:8])}{more}; {way_out}")


def _lightning_state(source: ImportSource, *, has_optimizers: bool) -> dict[str, Any]:
    """What `Trainer.fit` reads besides tensors: the source's own state, or that of step 0."""
    state = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": _lightning_version(), **source.state}
    if has_optimizers:
        state.setdefault("lr_schedulers", [])
    else:  # without this key Lightning says that the checkpoint holds a model only; with it, a resume fails later
        state.pop("lr_schedulers", None)
    return state


def _lightning_version() -> str:
    for name in ("lightning", "pytorch-lightning"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "2.5.0"


class _Job:
    """What the target holds.

    Attributes:
        names: Name in the source -> name in the target, of parameters whose optimizer state comes along.
        buffers: Tensors that are no parameters, by name in the target.
        aliases: Further names of tied tensors.
    """

    def __init__(self, source: ImportSource, like: ImportSource | None, places: Mapping[str, _Place]) -> None:
        self._source = source
        self._like = like
        self.aliases = _aliases(source, like, places)
        self.buffers: dict[str, TensorRef] = {}
        self.names: dict[str, str] = {}
        self._params: dict[str, dict[str, TensorRef]] = {}
        self._origins: dict[str, _Place] = {}
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
        return [*linked, *_composed(rest, self._shapes())]

    def dtypes(self, files: Iterable[UnitFile | ComposedFile]) -> dict[str, str]:
        """Dtypes at rest of parameters, where their origin tells them."""
        there = {entry.name for file in files for entry in file.entries}
        found: dict[str, str] = {}
        for name, place in self._origins.items():
            reader = self._like.reader if self._like is not None else place.source.reader
            known = name if self._like is not None else place.name
            if reader is not None and name in there and known in reader.manifest.dtypes:
                found[name] = reader.manifest.dtypes[known]
        return found

    def _add(self, name: str, place: _Place) -> None:
        old = place.source.aliases.get(place.name, place.name)
        is_buffer = old in place.source.buffers if self._like is None else name in self._like.buffers
        if is_buffer:
            self.buffers[name] = place.source.value(old)
            return
        kinds = place.source.parameters.get(old) or {"param": place.source.buffers[old]}
        missing = place.source is self._like
        if self._rests_in_16_bits(name) and "master" not in kinds and kinds["param"].dtype == "F32":
            kinds = {"master" if kind == "param" else kind: ref for kind, ref in kinds.items()}
        self._params[name] = {k: ref for k, ref in kinds.items() if not missing or k in VALUE_KINDS}
        self._origins[name] = place
        if not missing:
            self.names[old] = name

    def _rests_in_16_bits(self, name: str) -> bool:
        reader = None if self._like is None else self._like.reader
        return reader is not None and reader.manifest.dtypes.get(name) in ("BF16", "F16")

    def _shapes(self) -> dict[str, Shape]:
        like = self._like.shapes if self._like is not None else {}
        return {name: like.get(name, next(iter(kinds.values())).shape) for name, kinds in self._params.items()}

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
                entries = tuple(type(e)(new[e.name], e.dtype, e.shape, e.begin, e.end) for e in record.entries)
                inside = {new[e.name]: record.renamed.get(e.name, e.name) for e in record.entries}
                renamed = {name: old for name, old in inside.items() if name != old}
                where = (record.checksums, record.data_begin, renamed, reader.folder_of(record))
                file = UnitFile(record.unit, record.kind, path, True, entries, *where)
                found.append(file)
        return found


def _aliases(source: ImportSource, like: ImportSource | None, places: Mapping[str, _Place]) -> dict[str, str]:
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
        _compose(f"imported-{index}", kind, group, shapes)
        for kind, found in groups.items()
        for index, group in enumerate(found)
    ]


def _compose(unit: str, kind: str, group: Mapping[str, TensorRef], shapes: Mapping[str, Shape]) -> ComposedFile:
    def tensor_of(name: str) -> Tensor:
        return group[name].load().reshape(shapes[name])

    entries = lay_out((name, ref.dtype, shapes[name]) for name, ref in group.items())
    return ComposedFile(unit, kind, entries, tensor_of, partial(_drop, group))


def _drop(group: Mapping[str, TensorRef], name: str) -> None:
    group[name].drop()
