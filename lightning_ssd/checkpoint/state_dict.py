"""A checkpoint as the module's state dict: every name it had, each tensor in the dtype it had at rest, on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.errors import CheckpointError
from lightning_ssd.store.dtypes import name_of
from lightning_ssd.store.header import ITEMSIZE

OPTIMIZER_PREFIX = "optimizer."

STATE_DICT_EXTRA = "state_dict_extra"
"""Key of the saved state under which the entries of the module's state dict lie that are no tensors."""


class StateDictView(Mapping[str, Tensor]):
    """Parameters, aliases of tied ones and buffers of an open checkpoint; a tensor is mapped when it is asked for.

    Attributes:
        shapes: Shape of every tensor, known without reading one.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        """Look into ``reader``, which stays the caller's and must stay open.

        Raises:
            CheckpointError: If an alias leads nowhere.
        """
        self._reader = reader
        self._rest, _ = split_rest(reader)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in reader.parameter_names:
            self.shapes[name] = next(iter(reader.manifest.parameters[name].values()))[1].shape
        self.shapes |= {name: tuple(tensor.shape) for name, tensor in self._rest.items()}
        for alias, stored in reader.manifest.aliases.items():
            if stored not in self.shapes:
                raise CheckpointError(f"{reader.directory}: {alias!r} is tied to {stored!r}, which is not stored")
            self.shapes[alias] = self.shapes[stored]

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored_name(name)
        return self._rest[stored] if stored in self._rest else self._reader.value(stored)

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
        return name_of(self._rest[stored].dtype) if stored in self._rest else self._reader.dtype_at_rest(stored)

    def nbytes_of(self, name: str) -> int:
        """Bytes of a tensor in the dtype it had at rest."""
        return math.prod(self.shapes[name]) * ITEMSIZE[self.dtype_of(name)]

    def drop(self, name: str) -> None:
        """Give back the memory of a parameter's pages."""
        stored = self.stored_name(name)
        if stored not in self._rest:
            self._reader.drop_parameter(stored)


def split_rest(reader: CheckpointReader) -> tuple[dict[str, Tensor], dict[int, dict[str, dict[str, Tensor]]]]:
    """Split ``rest`` into the module's tensors and optimizer state: optimizer -> parameter -> key -> tensor."""
    module: dict[str, Tensor] = {}
    states: dict[int, dict[str, dict[str, Tensor]]] = {}
    records = reader.manifest.optimizers
    known = [{name for group in record.param_groups for name in group["params"]} for record in records]
    for full_name, tensor in reader.rest().items():
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
