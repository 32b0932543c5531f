"""A folder of ``torch.distributed.checkpoint``, read without a process group and without running what it pickles.

Torch reads the folder's ``.metadata`` with plain ``pickle``, which runs code. `_Unpickler` replaces each class that the
metadata may name by one of ours that only stores its arguments, and refuses every other name.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ssd.checkpoint.manifest import OptimizerRecord
from lightning_ssd.convert.sources import ImportSource, TensorRef, add_state, state_kinds
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.folder import close_fd, closing_fd
from lightning_ssd.io.safe_open import open_folder, open_inside
from lightning_ssd.sizes import MiB
from lightning_ssd.store.dtypes import dtype_of, name_of
from lightning_ssd.store.safetensors_header import is_count
from lightning_ssd.store.torch_file import check_pickle, load_any, load_pickle

METADATA = ".metadata"
META = "meta.pt"
"""Lightning's state besides tensors, in the folders that its strategies write."""

_MAX_METADATA_NBYTES = 512 * MiB
_OPTIMIZER = re.compile(r"optim(?:izer)?(?:_(\d+))?")
_MODEL = ("model", "state_dict")
_Path = tuple[Any, ...]


def is_dcp(path: str) -> bool:
    """Whether a folder is one of ``torch.distributed.checkpoint``."""
    return os.path.isdir(path) and os.path.lexists(os.path.join(path, METADATA))


def open_dcp(path: str | os.PathLike[str], *, weights_only: bool = True, with_state: bool = True) -> ImportSource:
    """Open the folder. Tensors of the module are below ``model`` or ``state_dict``, or everything that is below no
    ``optimizer``; optimizer state is below ``optimizer_0.state.NAME`` and the like, as Lightning and torch write it.

    Raises:
        CheckpointError: If the metadata is malformed or names anything that does not belong there.
    """
    where = os.path.abspath(os.fspath(path))
    folder = _Folder(where, weights_only)
    source = ImportSource(where)
    source.stack.callback(folder.close)
    with source.stack.pop_all() as stack:
        tops = {path[0] for path in folder.paths.values()}
        prefix = next((top for top in _MODEL if top in tops), None)
        states: dict[int, dict[str, dict[str, str]]] = {}
        groups: dict[int, dict[_Path, Any]] = {}
        for key, parts in folder.paths.items():
            number = _optimizer_number(parts)
            if number is None:
                if key in folder.tensors and (parts[0] == prefix or prefix is None):
                    source.add(".".join(map(str, parts[prefix is not None :])), folder.tensor_ref(key))
            elif parts[1] == "state" and len(parts) >= 4:
                states.setdefault(number, {}).setdefault(".".join(map(str, parts[2:-1])), {})[str(parts[-1])] = key
            elif parts[1] == "param_groups":
                groups.setdefault(number, {})[parts[2:]] = folder.value(key)
        for number in sorted({*states, *groups}) if with_state else ():
            _add_optimizer(source, folder, number, states.get(number, {}), groups.get(number, {}))
        source.state = folder.meta()
        source.stack = stack.pop_all()
    return source


def _optimizer_number(parts: _Path) -> int | None:
    found = _OPTIMIZER.fullmatch(str(parts[0])) if len(parts) >= 2 and parts[1] in ("state", "param_groups") else None
    return None if found is None else int(found[1] or 0)


def _groups(leaves: Mapping[_Path, Any]) -> list[dict[str, Any]]:
    """What was below ``param_groups``, which each version of torch cuts in another depth."""
    groups: dict[int, dict[str, Any]] = {}
    for parts in sorted(
        leaves, key=lambda parts: [(str(part), 0) if isinstance(part, str) else ("", part) for part in parts]
    ):
        value = leaves[parts]
        if not parts:
            groups |= {index: dict(group) for index, group in enumerate(value)}
        elif len(parts) == 1:
            groups[int(parts[0])] = dict(value)
        elif len(parts) == 2:
            groups.setdefault(int(parts[0]), {})[str(parts[1])] = value
        else:  # an element of a list
            groups.setdefault(int(parts[0]), {}).setdefault(str(parts[1]), []).append(value)
    return [groups[index] for index in sorted(groups)]


def _add_optimizer(
    source: ImportSource,
    folder: _Folder,
    number: int,
    states: Mapping[str, Mapping[str, str]],
    leaves: dict[_Path, Any],
) -> None:
    state: dict[str, dict[str, Any]] = {}
    for name, keys in states.items():
        if name not in source.parameters:
            raise CheckpointError(f"{source.where}: optimizer {number} has state of {name!r}, which has no value there")
        small = {k: folder.value(key) for k, key in keys.items() if not folder.is_full(key, source.value(name).shape)}
        state[name] = add_state(source, number, name, small)
        for kind, key in keys.items():
            if kind not in small:
                source.parameters[name][kind] = folder.tensor_ref(key)
    groups = _groups(leaves)
    if any(not all(isinstance(n, str) for n in group.get("params", [0])) for group in groups):
        groups = []  # numbers: of no use without the optimizer they were of
    source.optimizers.append(OptimizerRecord("unknown", groups, state, state_kinds(source, state)))


class _Folder:
    """The checked metadata, and tensors and values by key.

    Attributes:
        paths: Key -> where it was in the nested dictionary that was saved.
        tensors: Key -> dtype, shape, and (offsets, sizes) of each piece.
    """

    def __init__(self, where: str, weights_only: bool) -> None:
        self.where = where
        self._weights_only = weights_only
        self._fd = open_folder(where)
        try:
            self._read(self._metadata())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        close_fd(self._fd)

    def tensor_ref(self, key: str) -> TensorRef:
        dtype, shape, _ = self.tensors[key]
        return TensorRef(shape, dtype, lambda: self.tensor(key), lambda: None)

    def is_full(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether a state has its parameter's shape; the step count of one without dimensions is no such state."""
        found = self.tensors.get(key)
        return found is not None and found[1] == shape and not key.endswith(".step")

    def meta(self) -> dict[str, Any]:
        """Lightning's state besides tensors; nothing if it did not write the folder."""
        if not os.path.lexists(os.path.join(self.where, META)):
            return {}
        with closing_fd(open_inside(self._fd, META, self.where)) as fd:
            return load_pickle(f"/proc/self/fd/{fd}", os.path.join(self.where, META), self._weights_only)

    def value(self, key: str) -> Any:
        """A tensor, or whatever else was saved."""
        if key in self.tensors:
            return self.tensor(key)
        with self._slice(key, ()) as piece:
            return load_any(piece, f"{self.where}: {key}", self._weights_only)

    def tensor(self, key: str) -> Tensor:
        """A tensor, put together from its pieces."""
        dtype, shape, chunks = self.tensors[key]
        self._require_bytes(key)
        try:
            whole = torch.zeros(shape if len(chunks) != 1 else 0, dtype=dtype_of(dtype))
        except RuntimeError as error:
            raise CheckpointError(f"{self.where}: {key!r} of shape {list(shape)} cannot be held: {error}") from error
        for offsets, sizes in chunks:
            with self._slice(key, offsets) as piece:
                part = load_any(piece, f"{self.where}: {key}", True)
            if not isinstance(part, Tensor) or tuple(part.shape) != sizes or part.dtype != dtype_of(dtype):
                raise CheckpointError(f"{self.where}: a piece of {key!r} is not what the metadata says")
            if sizes == shape:
                return part
            whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = part
        return whole

    def _require_bytes(self, key: str) -> None:
        """Refuse a tensor whose pieces have less room in the files than they need, or share it."""
        dtype, _, chunks = self.tensors[key]
        places = [(self._place(key, offsets), math.prod(sizes) * dtype_of(dtype).itemsize) for offsets, sizes in chunks]
        there = {(path, begin) for (path, (begin, _)), nbytes in places if nbytes}
        if len(there) < sum(bool(nbytes) for _, nbytes in places) or any(p[1][1] < n for p, n in places):
            raise CheckpointError(f"{self.where}: the pieces of {key!r} do not lie one by one in its files")
        for (path, (begin, length)), _ in places:
            close_fd(self._open_place(key, path, begin + length))

    def _metadata(self) -> dict[str, Any]:
        fd = open_inside(self._fd, METADATA, self.where)
        with os.fdopen(fd, "rb") as file:
            if os.fstat(fd).st_size > _MAX_METADATA_NBYTES:
                raise CheckpointError(f"{self.where}: the metadata has {os.fstat(fd).st_size} bytes")
            data = file.read()
            check_pickle(data, f"{self.where}: the metadata")
            try:
                found = _Unpickler(io.BytesIO(data)).load()
            except CheckpointError:
                raise
            except Exception as error:  # a hostile pickle can make the unpickler fail in any way
                raise CheckpointError(f"{self.where}: the metadata cannot be read: {error}") from error
        return _fields(found, f"{self.where}: the metadata")

    def _read(self, metadata: dict[str, Any]) -> None:
        self.tensors: dict[str, tuple[str, tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]] = {}
        self._places: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = {}
        keys = _expect_dict(metadata.get("state_dict_metadata"), self.where)
        mappings = metadata.get("planner_data")
        mappings = mappings if isinstance(mappings, dict) else {}
        self.paths: dict[str, _Path] = {}
        for index, info in _expect_dict(metadata.get("storage_data"), self.where).items():
            self._read_place(_fields(index, self.where), _fields(info, self.where))
        for key, value in keys.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{self.where}: the metadata has a key that is no text")
            path = mappings.get(key)
            if not (isinstance(path, tuple) and path and all(isinstance(part, str | int) for part in path)):
                path = tuple(key.split("."))
            self.paths[key] = path
            fields = _fields(value, self.where)
            if "properties" in fields:
                self._read_tensor(key, fields)

    def _read_tensor(self, key: str, fields: dict[str, Any]) -> None:
        state = fields["properties"].state if isinstance(fields["properties"], _Stand) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if not isinstance(dtype, _Dtype):
            raise CheckpointError(f"{self.where}: {key!r} has no dtype")
        shape = _counts(fields.get("size"), key)
        chunks = []
        for chunk in fields.get("chunks") or []:
            inner = _fields(chunk, self.where)
            offsets, sizes = _counts(inner.get("offsets"), key), _counts(inner.get("sizes"), key)
            chunks.append((offsets, sizes))
        inside = all(
            len(o) == len(s) == len(shape) and all(a + b <= c for a, b, c in zip(o, s, shape, strict=True))
            for o, s in chunks
        )
        total, covered = math.prod(shape), sum(math.prod(sizes) for _, sizes in chunks)
        if (
            not inside
            or covered != total
            or len({o for o, s in chunks if math.prod(s)}) < sum(bool(math.prod(s)) for _, s in chunks)
        ):
            raise CheckpointError(f"{self.where}: the pieces of {key!r} do not make up its shape {list(shape)}")
        self.tensors[key] = (name_of(getattr(torch, dtype.name)), shape, chunks)

    def _read_place(self, index: dict[str, Any], info: dict[str, Any]) -> None:
        key, offset = index.get("fqn"), index.get("offset")
        path, place = info.get("relative_path"), (info.get("offset"), info.get("length"))
        if not isinstance(key, str) or not isinstance(path, str) or not all(map(is_count, place)):
            raise CheckpointError(f"{self.where}: the metadata has a place that is none")
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{self.where}: {key!r} is stored through {info['transform_descriptors']}, which is not read here"
            )
        self._places[key, () if offset is None else _counts(offset, key)] = (path, _counts(place, key))

    def _slice(self, key: str, offsets: tuple[int, ...]) -> io.BufferedReader:
        path, (begin, nbytes) = self._place(key, offsets)
        return io.BufferedReader(_Slice(self._open_place(key, path, begin + nbytes), begin, nbytes), 1 * MiB)

    def _place(self, key: str, offsets: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        place = self._places.get((key, offsets)) or self._places.get((key, ()))
        if place is None:
            raise CheckpointError(f"{self.where}: the metadata does not say where {key!r} is")
        return place

    def _open_place(self, key: str, path: str, end: int) -> int:
        """A file that has at least ``end`` bytes, open."""
        fd = open_inside(self._fd, path, self.where)
        if end > os.fstat(fd).st_size:
            close_fd(fd)
            raise CheckpointError(f"{self.where}: {path!r} is too short for {key!r}")
        return fd


class _Slice(io.RawIOBase):
    """Part of a file as a file; closes the descriptor."""

    def __init__(self, fd: int, begin: int, nbytes: int) -> None:
        self._fd = fd
        self._begin = begin
        self._nbytes = nbytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._nbytes}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        nbytes = max(min(len(buffer), self._nbytes - self._position), 0)
        done = os.preadv(self._fd, [memoryview(buffer)[:nbytes]], self._begin + self._position) if nbytes else 0
        self._position += done
        return done

    def close(self) -> None:
        if not self.closed:
            close_fd(self._fd)
        super().close()


class _Stand:
    """Stands in for an object of a class that metadata may hold; keeps its state and does nothing."""

    state: Any = None  # objects that are unpickled are not initialised

    def __init__(self, *arguments: Any) -> None:
        """Take what an enum member or a path is made from."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype:
    """Stands in for a constant of torch, such as ``torch.float32``."""

    def __init__(self, name: str) -> None:
        self.name = name


_CLASSES = {
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo",
}  # fmt: skip
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")


class _Unpickler(pickle.Unpickler):
    """Knows only classes of ours. Each load has its own, so that nothing a pickle does to a class outlives it."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if module in _MODULES and name in _CLASSES:
            return type(name, (_Stand,), {})
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return _Dtype(name)  # type: ignore[return-value]  # a constant, not called
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch.serialization", "_get_layout") or module.partition(".")[0] == "pathlib":
            return type(name, (_Stand,), {})
        if (module, name) in (("collections", "OrderedDict"), ("builtins", "set")):
            return OrderedDict if name == "OrderedDict" else set
        raise CheckpointError(f"the metadata of a torch.distributed.checkpoint folder names {module}.{name}")


def _fields(value: object, where: str) -> dict[str, Any]:
    """Fields of a stand-in for a dataclass."""
    if isinstance(value, _Stand) and isinstance(value.state, dict):
        return value.state
    if isinstance(value, _Stand) and value.state is None:
        return {}
    raise CheckpointError(f"{where} is not what torch.distributed.checkpoint writes")


def _expect_dict(value: object, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: the metadata is not what torch.distributed.checkpoint writes")
    return value


def _counts(value: object, key: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(map(is_count, value)) or len(value) > 64:
        raise CheckpointError(f"the metadata of {key!r} has {str(value)[:80]!r} for a shape or place")
    return value
