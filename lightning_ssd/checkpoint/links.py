"""The folder of links of a file that torch loads, whose tensors are mapped as the unpickler asks for them.

[Note: what is open] Torch's unpickler tells a constructor nothing about the file it reads. So the file is looked up
where `torch.load` keeps it: in the local variables of that call, from the descriptor that is open or from the path it
was given. ``map_location`` is found there too, and applied as torch applies it to its own storages.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_ssd.checkpoint.link_file import LinkMark, find_links
from lightning_ssd.codec.encodings import STORED_DTYPE, encoding_of, stored_shape
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.folder import Folder, closing_fd
from lightning_ssd.io.safe_open import open_inside
from lightning_ssd.store.decoded import decoded, values_of
from lightning_ssd.store.dtypes import dtype_of, name_of
from lightning_ssd.store.mapped_safetensors import MappedFile
from lightning_ssd.store.safetensors_header import ITEMSIZE

DECODED = "decoded"
"""In the place of a path: what follows is decoded from several places."""


class Links:
    """The folder beside the file that `torch.load` is reading; see [Note: links] and [Note: what is open].

    Args:
        text: What the file says about the folder, a `LinkMark`.

    Raises:
        CheckpointError: The folder is not there, or not the file's.
    """

    def __init__(self, text: str) -> None:
        mark = LinkMark.parse(text)
        self.id = mark.id
        call = _torch_load()
        self._map_location = call.get("map_location")
        path = _path_of(call)
        if path is None:
            raise CheckpointError(
                f"a checkpoint in the form 'links' can only be loaded from a file on disk, whose tensors are in the "
                f"folder {mark.folder!r} beside it, not from a buffer or stream: call torch.load with its path, or "
                "save with checkpoint='file'"
            )
        self._folder: Folder = find_links(path, mark)
        self._files: dict[str, MappedFile] = {}
        weakref.finalize(self, Folder.close, self._folder)

    @classmethod
    def require(cls, links: object) -> Links:
        """``links``, which a file may have made anything.

        Raises:
            CheckpointError: It is something else.
        """
        if not isinstance(links, Links):
            raise CheckpointError(f"a tensor is said to be in a {type(links).__name__}, not in a folder of links")
        return links

    def get(self, *place: object) -> Tensor | str:
        """The tensor at ``place``, as in `lightning_ssd.links.linked`; without a place the id.

        Raises:
            CheckpointError: The place is malformed, or not in the folder.
        """
        if not place:
            return self.id
        if place[0] == DECODED:
            return _on_device(self._decoded(*place[1:]), self._map_location)
        types = (str, int, str, str)
        if not 3 <= len(place) <= 4 or not all(map(isinstance, place, types)):
            raise self._malformed(place)
        return _on_device(self._tensor(*place), self._map_location)  # type: ignore[arg-type]  # checked above

    def _malformed(self, place: object) -> CheckpointError:
        return CheckpointError(f"{self._folder.path}: {place!r:.300} is not the place of a tensor")

    def _decoded(self, *place: object) -> Tensor:
        """The values of a kind of a parameter of which files have parts: its name, then part and place of each."""
        kind, *places = place
        parts: dict[str, Tensor] = {}
        for each in places:
            match each:
                case (str(part), str(path), int(nbytes), str(name)):
                    parts[part] = self._tensor(path, nbytes, name)
                case _:
                    raise self._malformed(place)
        encoding = encoding_of(str(kind), parts)
        if encoding is None or not parts.keys() >= set(encoding.needed):
            raise self._malformed(place)
        shape = tuple(parts[encoding.parts[0]].shape)
        for part, tensor in parts.items():
            wanted = STORED_DTYPE.get(part, "BF16"), stored_shape(part, shape)
            if (name_of(tensor.dtype), tuple(tensor.shape)) != wanted:
                raise self._malformed(place)
        return decoded(encoding, parts, shape)

    def _tensor(self, path: str, nbytes: int, name: str, dtype: str = "") -> Tensor:
        if path not in self._files:
            with closing_fd(open_inside(self._folder.fd, path, self._folder.path)) as fd:
                where = os.path.join(self._folder.path, path)
                found = os.fstat(fd).st_size
                if found != nbytes:
                    raise CheckpointError(f"{where} has {found} bytes, not {nbytes} as when it was saved")
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # only the header is read, nothing ahead of it
                self._files[path] = MappedFile(fd, where)
        tensor = self._files[path].tensor(name)
        if dtype in ITEMSIZE:
            tensor = tensor.to(dtype_of(dtype))
        return tensor


def _torch_load() -> Mapping[str, Any]:
    """Local variables of the `torch.load` that is running; none if something else unpickles."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "load" and frame.f_globals.get("__name__") == "torch.serialization":
            return frame.f_locals
    return {}


def _path_of(call: Mapping[str, Any]) -> str | None:
    """Where the file is that `torch.load` reads; None if it is no file."""
    opened = call.get("opened_file")
    for file in (getattr(opened, "file_like", None), opened, call.get("f")):
        if isinstance(file, (str, os.PathLike)):
            return os.path.realpath(file)
        with suppress(AttributeError, OSError, ValueError):  # a buffer has no descriptor
            path = os.readlink(f"/proc/self/fd/{file.fileno()}")  # type: ignore[union-attr]
            if path.startswith("/"):  # a pipe has another name
                return path
    return None


def _on_device(tensor: Tensor, map_location: Any) -> Tensor:
    """``tensor``, saved from the host, where ``map_location`` puts it."""
    if map_location is None or map_location == "cpu":
        return tensor
    tensor = values_of(tensor)
    restore = torch.serialization._get_restore_location(map_location)  # type: ignore[no-untyped-call]
    storage = restore(tensor.untyped_storage(), "cpu")
    if storage.device == tensor.device and storage.data_ptr() == tensor.untyped_storage().data_ptr():
        return tensor
    return torch.empty(0, dtype=tensor.dtype, device=storage.device).set_(storage, 0, tensor.shape, tensor.stride())
