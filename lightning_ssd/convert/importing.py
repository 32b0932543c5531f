"""Make a checkpoint of ours from another format, or from one of ours for a model with other parameter names.

Tensors are copied one at a time from the source's mapped files. Where the source is a checkpoint of ours, a unit file
is linked if every tensor in it is wanted. Without a *model checkpoint* the target holds what the source holds. A model
checkpoint is one that the new model saved, at any step (``like``): from it come names, shapes, optimizer groups, and
the values of parameters that the source does not have.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning_ssd.checkpoint.contents import CheckpointContent
from lightning_ssd.checkpoint.dictionary import STATE_DICT_EXTRA
from lightning_ssd.checkpoint.directory import is_checkpoint
from lightning_ssd.checkpoint.link_file import LINKS, mark_of
from lightning_ssd.checkpoint.state_dict import OPTIMIZER_PREFIX, VALUE_KINDS
from lightning_ssd.checkpoint.unit_file import ComposedFile
from lightning_ssd.checkpoint.writer import Progress
from lightning_ssd.convert.dcp import is_dcp, open_dcp
from lightning_ssd.convert.deepspeed import is_universal, open_universal
from lightning_ssd.convert.import_optimizer import optimizers_for
from lightning_ssd.convert.import_plan import ImportPlan, Place
from lightning_ssd.convert.match import Shape, match
from lightning_ssd.convert.rename import Renaming
from lightning_ssd.convert.sources import (
    ImportSource,
    open_checkpoint,
    open_torch_file,
)
from lightning_ssd.convert.weight_files import open_weight_files
from lightning_ssd.errors import CheckpointError
from lightning_ssd.saving.write import write_checkpoint

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
        target: The new checkpoint, a small file with its links beside it; must not exist.
        options: How to import; the defaults of `ImportOptions` if None.
        progress: Called with bytes done and bytes in all.

    Raises:
        CheckpointError: If source and model do not fit, or the source is not what it should be. Nothing was written.
    """
    options = options or ImportOptions()
    to = os.path.abspath(os.fspath(target))
    for path in (to, to + LINKS):
        if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
            raise CheckpointError(f"{path!r} exists; choose a name that does not exist")
    with ExitStack() as stack:
        found = stack.enter_context(_open_wanted(source, options))
        like = None if options.like is None else stack.enter_context(open_checkpoint(options.like))
        places, report = _pair(found, like, options)
        plan = ImportPlan(found, like, places)
        records, extra = optimizers_for(found, like, plan.names, options.step)
        report.optimizers = "none" if not records else "imported" if found.optimizers else "fresh"
        state = _lightning_state(found, has_optimizers=bool(records))
        report.step = int(state.get("global_step", 0))
        if options.dry_run:
            return report
        files = plan.files(with_state=bool(records))
        if any(isinstance(file, ComposedFile) for file in files):  # a link keeps its checksums
            _verify(found, None if records else VALUE_KINDS)
            _verify(like, VALUE_KINDS)
        buffers = {name: ref.load() for name, ref in plan.buffers.items()}
        buffers |= {f"{OPTIMIZER_PREFIX}{index}.{name}.{key}": value for index, name, key, value in extra}
        dtypes, aliases = plan.dtypes(files), plan.aliases
        content = CheckpointContent(files, buffers, state, records, report.step, dtypes, aliases)
        done = write_checkpoint(to, content, with_file=True, progress=progress)
    report.nbytes_linked, report.nbytes_written = done.nbytes_linked, done.nbytes_written
    return report


def open_source(path: str | os.PathLike[str], *, trust: bool = False, with_state: bool = True) -> ImportSource:
    """Open a source of any known format; see `import_checkpoint`.

    Args:
        path: The source.
        trust: See `ImportOptions`.
        with_state: Optimizer state is wanted; else it may be anything.

    Raises:
        CheckpointError: If the format is unknown, or the source is malformed.
    """
    name = os.path.abspath(os.fspath(path))
    if is_checkpoint(name) or mark_of(name) is not None:
        return open_checkpoint(name, weights_only=not trust, with_state=with_state)
    if is_dcp(name):
        return open_dcp(name, weights_only=not trust, with_state=with_state)
    if is_universal(name):
        return open_universal(name, weights_only=not trust)
    if os.path.lexists(name) and not os.path.isdir(name) and not name.endswith(".safetensors"):
        return open_torch_file(name, weights_only=not trust, with_state=with_state)
    return open_weight_files(name)


def _open_wanted(path: str | os.PathLike[str], options: ImportOptions) -> ImportSource:
    """A source, without what is left behind."""
    source = open_source(path, trust=options.trust, with_state=not options.weights_only)
    if options.weights_only:
        _leave_weights(source)
    return source


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
) -> tuple[dict[str, Place], ImportReport]:
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
        return {new: Place(source, old) for new, old in old_names.items()}, report
    wanted = like.shapes
    found = {new: _shape(source, old, wanted.get(new)) for new, old in old_names.items()}
    matched = match(wanted, found, tied=like.aliases, by_prefix=not options.renaming)
    _refuse_faults(matched.mismatched, matched.missing, matched.unexpected, source.where, partial=options.partial)
    places = {name: Place(source, old_names[new]) for name, new in matched.sources.items()}
    places |= {name: Place(like, name) for name in matched.missing}
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
