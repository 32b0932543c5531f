"""A checkpoint as the module's state dict: every name, each tensor in its own dtype, mapped on demand."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_ssd.checkpoint.manifest import FileRecord, Manifest
from lightning_ssd.codec.encodings import decoded_kinds
from lightning_ssd.errors import CheckpointError
from lightning_ssd.store.dtypes import name_of
from lightning_ssd.store.safetensors_header import ITEMSIZE, TensorEntry

if TYPE_CHECKING:
    from lightning_ssd.checkpoint.contents import Contents

OPTIMIZER_PREFIX = "optimizer."

VALUE_KINDS = ("param", "master")
"""Kinds of unit files that hold a parameter's value."""


class StateDictView(Mapping[str, Tensor]):
    """Parameters, aliases of tied ones and buffers of an open checkpoint; a tensor is mapped when it is asked for.

    Attributes:
        shapes: Shape of every tensor, known without reading one.
    """

    def __init__(self, reader: Contents, weights_only: bool | None = None) -> None:
        """Look into ``reader``, which stays the caller's and must stay open; see `Contents.buffers`.

        Raises:
            CheckpointError: If a name leads nowhere.
        """
        self._reader = reader
        self._buffers, _ = split_buffers(reader, weights_only)
        manifest = reader.manifest
        require_whole(manifest, self._buffers, reader.directory)
        stored = {
            name: next(places[k] for k in VALUE_KINDS if k in places)[1].shape
            for name, places in valued(manifest).items()
        }
        stored |= {name: tuple(tensor.shape) for name, tensor in self._buffers.items()}
        stored |= {alias: stored[name] for alias, name in manifest.aliases.items()}
        names = stored if manifest.names is None else manifest.names
        self.shapes: dict[str, tuple[int, ...]] = {name: stored[name] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored_name(name)
        return self._buffers[stored] if stored in self._buffers else self._reader.value(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def stored_name(self, name: str) -> str:
        """The name under which a tensor is stored; another than its own if it is tied."""
        return self._reader.manifest.aliases.get(name, name)

    def dtype_of(self, name: str) -> str:
        """Safetensors dtype of a tensor, known without reading it."""
        stored = self.stored_name(name)
        return name_of(self._buffers[stored].dtype) if stored in self._buffers else self._reader.own_dtype(stored)

    def nbytes_of(self, name: str) -> int:
        """Bytes of a tensor in its own dtype."""
        return math.prod(self.shapes[name]) * ITEMSIZE[self.dtype_of(name)]

    def is_in_place(self, name: str) -> bool:
        """Whether a tensor is mapped as it lies in its file, without a conversion."""
        stored = self.stored_name(name)
        return stored in self._buffers or self._reader.is_in_place(stored)

    def drop(self, name: str) -> None:
        """Give back the memory of a parameter's pages."""
        stored = self.stored_name(name)
        if stored not in self._buffers:
            self._reader.drop_parameter(stored)


def valued(manifest: Manifest) -> dict[str, Mapping[str, tuple[FileRecord, TensorEntry]]]:
    """Parameters whose values are in unit files, and where. Others may have optimizer state only."""
    return {name: places for name, places in manifest.parameters.items() if any(k in places for k in VALUE_KINDS)}


def require_whole(manifest: Manifest, buffers: Collection[str], where: str) -> None:
    """Refuse a checkpoint that lists a tensor without storing it.

    Args:
        manifest: The checkpoint.
        buffers: Names of what is not in unit files.
        where: Its path, for messages.

    Raises:
        CheckpointError: Names the tensor.
    """
    values = valued(manifest)
    for alias, stored in manifest.aliases.items():
        if stored not in values and stored not in buffers:
            raise CheckpointError(f"{where}: {alias!r} is tied to {stored!r}, which is not stored")
    for name in manifest.names or ():
        if name not in values and name not in buffers and name not in manifest.aliases:
            raise CheckpointError(f"{where}: {name!r} of the state dict is not stored")
    for number, record in enumerate(manifest.optimizers):
        for name in record.state if record.kinds else ():
            kinds = decoded_kinds(manifest.parameters.get(name, {}))
            # Older checkpoints (without names) do not say which kinds a parameter has.
            is_told = manifest.names is not None
            wanted = set(record.kinds).difference(record.lacking.get(name, ())) if is_told else set[str]()
            if not wanted <= set(kinds) or (not is_told and not kinds):
                raise CheckpointError(
                    f"{where}: optimizer {number} ({record.class_name}) has updated {name!r}, whose "
                    f"{', '.join(sorted(wanted.difference(kinds))) or 'state'} is not stored: training cannot go on "
                    "from this checkpoint; the weights in it can be exported"
                )


def split_buffers(
    reader: Contents, weights_only: bool | None = None
) -> tuple[dict[str, Tensor], dict[int, dict[str, dict[str, Tensor]]]]:
    """Split ``buffers`` into the module's tensors and optimizer state: optimizer -> parameter -> key -> tensor."""
    module: dict[str, Tensor] = {}
    states: dict[int, dict[str, dict[str, Tensor]]] = {}
    records = reader.manifest.optimizers
    known = [{name for group in record.param_groups for name in group["params"]} for record in records]
    for full_name, tensor in reader.buffers(weights_only).items():
        place = _optimizer_place(full_name, known)
        if place is None:
            module[full_name] = tensor
        else:
            index, name, key = place
            states.setdefault(index, {}).setdefault(name, {})[key] = tensor
    return module, states


def _optimizer_place(full_name: str, known: list[set[str]]) -> tuple[int, str, str] | None:
    """Optimizer, parameter and key of a name such as ``optimizer.0.model.weight.row_factor``."""
    if not full_name.startswith(OPTIMIZER_PREFIX):
        return None
    index, _, rest = full_name[len(OPTIMIZER_PREFIX) :].partition(".")
    name, _, key = rest.rpartition(".")
    if index.isascii() and index.isdigit() and len(index) < 6 and int(index) < len(known) and name in known[int(index)]:
        return int(index), name, key
    return None
