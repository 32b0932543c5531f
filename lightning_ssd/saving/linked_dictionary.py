"""Lightning's dictionary with calls in place of its tensors, as the small file of [Note: links] holds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ssd.checkpoint.contents import CheckpointContent, Contents
from lightning_ssd.checkpoint.dictionary import dictionary_of, own_entries, without_empty_loader_states
from lightning_ssd.checkpoint.link_file import KEY, LinkMark
from lightning_ssd.checkpoint.links import DECODED
from lightning_ssd.checkpoint.manifest import BUFFERS, FileRecord, Manifest, OptimizerRecord
from lightning_ssd.checkpoint.state_dict import StateDictView
from lightning_ssd.checkpoint.writer import is_plain
from lightning_ssd.links import linked
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.safetensors_header import TensorEntry


class _Call:
    """What the unpickler calls, `lightning_ssd.links.linked`, and with what."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return linked, self._arguments


class _LinkedTensor(Tensor):
    """Stands for a tensor in a file of the checkpoint; has its shape and dtype, and is pickled as a call."""

    call: _Call

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.call.__reduce__()


class LinkedContents(Contents):
    """A checkpoint that is being written: its tensors are calls that will map them.

    Args:
        mark: What the file says about the folder.
        manifest: What the folder holds.
        content: What was written to it.
    """

    def __init__(self, mark: LinkMark, manifest: Manifest, content: CheckpointContent) -> None:
        self.directory = mark.folder
        self.manifest = manifest
        self.folder = _Call(str(mark))
        self._content = content
        nbytes = manifest.small_files[BUFFERS].nbytes
        self._buffers = {
            name: self._linked(tensor.shape, tensor.dtype, BUFFERS, nbytes, name) if is_plain(tensor) else tensor
            for name, tensor in content.buffers.items()
        }

    def tensor(self, name: str, kind: str) -> Tensor:
        """A call that maps one kind of a parameter."""
        return self._of(name, kind)

    def value(self, name: str) -> Tensor:
        """A call that maps a parameter, and converts it if no file holds its own dtype."""
        dtype = self.own_dtype(name)
        kind, exact = self._form(name, dtype)
        return self._of(name, kind, *(() if exact else (dtype,)))

    def buffers(self, weights_only: bool | None = None) -> dict[str, Tensor]:
        """Calls, or tensors that are in no safetensors file."""
        return self._buffers

    def state(self, weights_only: bool | None = None) -> dict[str, Any]:
        """A copy of the state."""
        return dict(self._content.state)

    def optimizers(self, weights_only: bool | None = None) -> list[OptimizerRecord]:
        """The records."""
        return list(self._content.optimizers)

    def drop_parameter(self, name: str) -> None:
        """Do nothing: no tensor of this has memory."""

    def _of(self, name: str, kind: str, *dtype: str) -> Tensor:
        encoded = self._encoded(name, kind)
        own = dtype_of(dtype[0] if dtype else self._dtype(name, kind))
        if encoded is None:
            record, entry = self._place(name, kind)
            return self._linked(entry.shape, own, *_place_in(record, entry), *dtype)
        encoding, places = encoded
        parts = [(part, *_place_in(*place)) for part, place in places.items()]
        return self._linked(places[encoding.parts[0]][1].shape, own, DECODED, kind, *parts)

    def _linked(self, shape: tuple[int, ...], dtype: torch.dtype, *place: Any) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device="meta").as_subclass(_LinkedTensor)
        made.call = _Call(self.folder, *place)
        return made


def _place_in(record: FileRecord, entry: TensorEntry) -> tuple[str, int, str]:
    return record.path, record.nbytes, record.renamed.get(entry.name, entry.name)


def linked_dictionary(contents: LinkedContents) -> dict[str, Any]:
    """What the small file holds: Lightning's dictionary, and entries from which a run of ours resumes to the bit."""
    content = dictionary_of(contents, StateDictView(contents), None)
    return {KEY: _Call(contents.folder), **without_empty_loader_states(content), **own_entries(contents)}
