"""Weights to start from, wherever they lie: a checkpoint of ours, a Hugging Face folder, a safetensors or a torch file.

A source gives names first and tensors one at a time, each where its file is mapped; `stream` drops the pages of each
tensor after use, so a model larger than memory passes through without ever being in it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_ssd.checkpoint.directory import is_checkpoint
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.mapped import MappedFile, drop_pages
from lightning_ssd.checkpoint.state_dict import StateDictView
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.folder import Folder, close_fd
from lightning_ssd.io.safe_open import open_inside, open_regular
from lightning_ssd.store.safetensors_header import MAX_HEADER_NBYTES, parse_json_object
from lightning_ssd.store.torch_file import load_pickle

Shape = tuple[int, ...]

_MAX_CANDIDATES = 8

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class WeightSource(Protocol):
    """Named tensors that lie in mapped files.

    Attributes:
        where: What messages call the source.
        shapes: Shape of every tensor, by name; known without reading one.
    """

    where: str
    shapes: Mapping[str, Shape]

    def tensor(self, name: str) -> Tensor:
        """The tensor, in place. Its values may be gone once `drop` was called for the name."""

    def drop(self, name: str) -> None:
        """Give back the memory of the tensor's pages."""

    def close(self) -> None:
        """Let go of the files; ends the use of tensors that were not copied."""


@dataclass(frozen=True)
class Match:
    """Which tensor of a source belongs to which name of a model.

    Attributes:
        sources: Name wanted -> name in the source, where the shapes agree.
        missing: Names wanted that the source does not have.
        unexpected: Names of the source that nobody wants.
        mismatched: Name wanted -> (shape wanted, shape in the source).
    """

    sources: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, tuple[Shape, Shape]]

    def raise_for_faults(self, where: str, *, strict: bool = True) -> None:
        """Refuse a match that would leave a parameter without its weights.

        Raises:
            CheckpointError: If shapes disagree, or with ``strict`` if names are missing or unexpected.
        """
        faults = [
            f"{name!r} is {list(have)} there and {list(want)} here" for name, (want, have) in self.mismatched.items()
        ]
        if strict:
            faults += [f"{name!r} is missing there" for name in self.missing]
            faults += [f"{name!r} is unknown here" for name in self.unexpected]
        if faults:
            more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise CheckpointError(
                f"the weights of {where} do not fit the model: {'; '.join(faults[:8])}{more}"
                + ("; pass strict=False to load the others" if strict and not self.mismatched else "")
            )


def open_weights(path: str | os.PathLike[str], *, weights_only: bool = True) -> WeightSource:
    """Open weights of whatever kind ``path`` is.

    Args:
        path: A checkpoint directory, a folder with ``model.safetensors`` or its index, or a file that ends in
            ``.safetensors``, ``.ckpt``, ``.pt``, ``.pth`` or ``.bin``.
        weights_only: False unpickles whatever a torch file names, which runs its code; only for files you trust.

    Raises:
        CheckpointError: If there is nothing of the kind, or it is malformed.
    """
    name = os.path.abspath(os.fspath(path))
    if is_checkpoint(name):
        return _CheckpointWeights(name)
    if os.path.isdir(name):
        return _folder(name)
    if name.endswith(".safetensors"):
        return _SafetensorsWeights(os.path.dirname(name), {os.path.basename(name): None}, follow_last=True)
    if os.path.lexists(name):
        return _TorchWeights(name, weights_only)
    raise CheckpointError(f"{name!r} is no file, no checkpoint directory and no folder with {_SINGLE}")


def match(
    wanted: Mapping[str, Shape],
    found: Mapping[str, Shape],
    *,
    tied: Mapping[str, str] | None = None,
    prefix: str | None = None,
) -> Match:
    """Find each wanted name in a source, which may name everything with one prefix more or less.

    Args:
        wanted: Names and shapes of the model.
        found: Names and shapes of the source.
        tied: Wanted name -> wanted name of the same tensor; either one of them in the source serves both.
        prefix: What the wanted names have in front of the source's (``"model."``); with a leading minus what the
            source's have in front of them. None finds out what front to exchange for which: the one with which most
            names and shapes agree.
    """
    to_source = _renaming(wanted, found, prefix)
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


def stream(source: WeightSource, matched: Match) -> Iterator[tuple[str, Tensor]]:
    """Give (name wanted, tensor) one after the other; a tensor's memory is dropped when the next one is asked for."""
    for name, source_name in matched.sources.items():
        try:
            yield name, source.tensor(source_name)
        finally:
            source.drop(source_name)


def _renaming(wanted: Mapping[str, Shape], found: Mapping[str, Shape], prefix: str | None) -> _Renaming:
    if prefix is not None:
        return _Renaming("", prefix[1:]) if prefix.startswith("-") else _Renaming(prefix, "")
    fronts: dict[tuple[str, Shape], list[str]] = {}
    for name, shape in found.items():
        for front, rest in _splits(name):
            fronts.setdefault((rest, shape), []).append(front)
    votes = Counter({_Renaming("", ""): 0})
    for name, shape in wanted.items():
        for here, rest in _splits(name):
            candidates = fronts.get((rest, shape), ())
            # A rest as common as "weight" says nothing about the front, and would cost the square of the names.
            if len(candidates) <= _MAX_CANDIDATES:
                votes.update(_Renaming(here, there) for there in candidates)
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
class _Renaming:
    """Wanted names begin with ``here`` where those of the source begin with ``there``."""

    here: str
    there: str

    def __call__(self, name: str) -> str | None:
        return self.there + name[len(self.here) :] if name.startswith(self.here) else None


class _CheckpointWeights:
    """Parameters and buffers of a checkpoint of ours, in the dtype they had at rest."""

    def __init__(self, path: str) -> None:
        self.where = path
        self._reader = CheckpointReader(path)
        self._view = StateDictView(self._reader)
        self.shapes: Mapping[str, Shape] = self._view.shapes

    def tensor(self, name: str) -> Tensor:
        return self._view[name]

    def drop(self, name: str) -> None:
        self._view.drop(name)

    def close(self) -> None:
        self._reader.close()


class _SafetensorsWeights:
    """Tensors of the safetensors files in a folder."""

    def __init__(self, folder: str, shards: Mapping[str, set[str] | None], *, follow_last: bool = False) -> None:
        """Open ``shards``: file name -> names it must hold at least (None: whatever it holds)."""
        self.where = folder
        self._files: dict[str, MappedFile] = {}
        directory_fd = _open_folder(folder)
        try:
            for shard, names in shards.items():
                self._add(directory_fd, folder, shard, names, follow_last)
        finally:
            close_fd(directory_fd)
        self.shapes: Mapping[str, Shape] = {name: file.header.entries[name].shape for name, file in self._files.items()}

    def tensor(self, name: str) -> Tensor:
        return self._files[name].tensor(name)

    def drop(self, name: str) -> None:
        self._files[name].drop(name)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _add(self, directory_fd: int, folder: str, shard: str, names: set[str] | None, follow: bool) -> None:
        where = os.path.join(folder, shard)
        fd = _open_followed(where) if follow else _open_shard(directory_fd, folder, shard)
        try:
            file = MappedFile(fd, where)
        finally:
            close_fd(fd)
        for name in sorted(names or file.header.entries):
            if name not in file.header.entries:
                raise CheckpointError(f"{folder}: the index puts {name!r} into {shard!r}, which does not hold it")
            self._files[name] = file


class _TorchWeights:
    """Tensors of a file written by ``torch.save``: a state dict, or a Lightning checkpoint that holds one."""

    def __init__(self, path: str, weights_only: bool) -> None:
        self.where = path
        content = load_pickle(path, path, weights_only)
        state = content.get("state_dict", content)
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{path}: state_dict is a {type(state).__name__}, not a dictionary")
        self._tensors = {str(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}
        if not self._tensors:
            raise CheckpointError(f"{path} holds no named tensors, neither at the top nor under 'state_dict'")
        self.shapes: Mapping[str, Shape] = {name: tuple(t.shape) for name, t in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def drop(self, name: str) -> None:
        tensor = self._tensors[name]
        if tensor.layout == torch.strided and tensor.is_contiguous():
            drop_pages(tensor.data_ptr(), tensor.nbytes)

    def close(self) -> None:
        self._tensors = {}


def _folder(folder: str) -> WeightSource:
    if os.path.lexists(os.path.join(folder, _INDEX)):
        return _SafetensorsWeights(folder, _read_index(folder))
    if os.path.lexists(os.path.join(folder, _SINGLE)):
        return _SafetensorsWeights(folder, {_SINGLE: None})
    raise CheckpointError(
        f"{folder!r} holds neither {_SINGLE}, nor {_INDEX}, nor a checkpoint of lightning_ssd; name a file of another "
        "name (.safetensors, .ckpt, .bin) itself"
    )


def _read_index(folder: str) -> dict[str, set[str] | None]:
    where = os.path.join(folder, _INDEX)
    with Folder.open(folder) as opened, os.fdopen(_open_shard(opened.fd, folder, _INDEX), "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > MAX_HEADER_NBYTES:
            raise CheckpointError(f"{where}: {nbytes} bytes are no index")
        content = parse_json_object(file.read(nbytes), where)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map is missing or empty")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{where}: weight_map of {name!r} is {str(shard)!r:.80}, not a file name")
        shards.setdefault(shard, set()).add(name)
    return dict(shards)


def _open_folder(folder: str) -> int:
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot open folder {folder!r}: {error.strerror}") from error


def _open_shard(directory_fd: int, folder: str, shard: str) -> int:
    """Open a shard inside its folder; the cache of Hugging Face holds symlinks to its own ``blobs``, which are fine."""
    path = os.path.join(folder, shard)
    blobs = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(folder))), "blobs")
    if "/" not in shard and os.path.islink(path) and os.path.dirname(os.path.realpath(path)) == blobs:
        return _open_followed(path)
    return open_inside(directory_fd, shard, folder)


def _open_followed(path: str) -> int:
    try:
        with open_regular(path, path) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot open {path!r}: {error.strerror}") from error
