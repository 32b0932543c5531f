"""Weights in safetensors files: one file, or a Hugging Face folder. Tensors are mapped, not read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from lightning_ssd.convert.match import Shape
from lightning_ssd.convert.sources import ImportSource, TensorRef
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.folder import Folder, closing_fd
from lightning_ssd.io.safe_open import open_folder, open_inside, open_regular
from lightning_ssd.store.dtypes import name_of
from lightning_ssd.store.mapped_safetensors import MappedFile
from lightning_ssd.store.safetensors_header import MAX_HEADER_NBYTES, parse_json_object

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def open_weight_files(path: str | os.PathLike[str]) -> ImportSource:
    """A Hugging Face folder, or a ``.safetensors`` file: weights alone.

    Raises:
        CheckpointError: If there is nothing of the kind, or it is malformed.
    """
    name = os.path.abspath(os.fspath(path))
    if os.path.isdir(name):
        files = _folder(name)
    elif name.endswith(".safetensors"):
        files = _SafetensorsFiles(os.path.dirname(name), {os.path.basename(name): None}, follow_last=True)
    else:
        raise CheckpointError(f"{name!r} is no file, no checkpoint directory and no folder with {_SINGLE}")
    source = ImportSource(files.where)
    source.stack.callback(files.close)
    for tensor, shape in files.shapes.items():
        dtype = name_of(files.tensor(tensor).dtype)
        source.add(tensor, TensorRef(shape, dtype, partial(files.tensor, tensor), partial(files.drop, tensor)))
    return source


class _SafetensorsFiles:
    """Tensors of the safetensors files in a folder."""

    def __init__(self, folder: str, shards: Mapping[str, set[str] | None], *, follow_last: bool = False) -> None:
        """Open ``shards``: file name -> names it must hold at least (None: whatever it holds)."""
        self.where = folder
        self._files: dict[str, MappedFile] = {}
        with closing_fd(open_folder(folder)) as directory_fd:
            for shard, names in shards.items():
                self._add(directory_fd, folder, shard, names, follow_last)
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
        with closing_fd(_open_followed(where) if follow else _open_shard(directory_fd, folder, shard)) as fd:
            file = MappedFile(fd, where)
        for name in sorted(names or file.header.entries):
            if name not in file.header.entries:
                raise CheckpointError(f"{folder}: the index puts {name!r} into {shard!r}, which does not hold it")
            self._files[name] = file


def _folder(folder: str) -> _SafetensorsFiles:
    if os.path.lexists(os.path.join(folder, _INDEX)):
        return _SafetensorsFiles(folder, _read_index(folder))
    if os.path.lexists(os.path.join(folder, _SINGLE)):
        return _SafetensorsFiles(folder, {_SINGLE: None})
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


def _open_shard(directory_fd: int, folder: str, shard: str) -> int:
    """Open a shard inside its folder; the cache of Hugging Face holds symlinks to its own ``blobs``, which are fine."""
    path = os.path.join(folder, shard)
    blobs = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(folder))), "blobs")
    if "/" not in shard and os.path.islink(path) and os.path.dirname(os.path.realpath(path)) == blobs:
        return _open_followed(path)
    return open_inside(directory_fd, shard, folder)


def _open_followed(path: str) -> int:
    with open_regular(path, path) as file:
        return os.dup(file.fileno())
