"""What a checkpoint holds: as it is given to a save, and as a manifest says, with lookups that open nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_ssd.checkpoint.manifest import FileRecord, Manifest, OptimizerRecord
from lightning_ssd.checkpoint.unit_file import ComposedFile, UnitFile
from lightning_ssd.codec.encodings import (
    DECODED_DTYPE,
    STORED_DTYPE,
    Encoding,
    decoded_kinds,
    encoding_of,
    stored_shape,
)
from lightning_ssd.errors import CheckpointError
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.safetensors_header import TensorEntry


@dataclass(frozen=True)
class CheckpointContent:
    """What a checkpoint holds.

    Attributes:
        files: Unit files: generations to link or copy, or tensors to write.
        buffers: Tensors that are in no unit file, by state-dict name; optimizer state of a shape other than its
            parameter's as ``optimizer.<i>.<parameter>.<key>``.
        state: Everything else of Lightning's checkpoint dictionary.
        optimizers: One record per optimizer, in Lightning's order.
        step: Global step.
        dtypes: Safetensors dtype that each parameter computes in, where both ``param`` and ``master`` exist or neither
            has that dtype. Default: the dtype of ``master`` if there is one, else of ``param``.
        aliases: Further names of tied tensors -> the name under which the tensor is in ``files`` or ``buffers``.
        names: The tensors of the module's state dict; see `Manifest.names`.
    """

    files: Sequence[UnitFile | ComposedFile]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    optimizers: Sequence[OptimizerRecord] = ()
    step: int = 0
    dtypes: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    names: Sequence[str] | None = None


class Contents(ABC):
    """A checkpoint that is read, or one that is being written.

    Attributes:
        directory: Its absolute path.
        manifest: What it holds.
    """

    directory: str
    manifest: Manifest

    @abstractmethod
    def tensor(self, name: str, kind: str) -> Tensor:
        """One kind of a parameter."""

    @abstractmethod
    def buffers(self, weights_only: bool | None = None) -> dict[str, Tensor]:
        """Every tensor that is in no unit file."""

    @abstractmethod
    def state(self, weights_only: bool | None = None) -> dict[str, Any]:
        """Everything else of Lightning's checkpoint dictionary."""

    @abstractmethod
    def optimizers(self, weights_only: bool | None = None) -> list[OptimizerRecord]:
        """The optimizer records, as they were saved."""

    @abstractmethod
    def drop_parameter(self, name: str) -> None:
        """Free the memory of one parameter's mapped pages, of all kinds."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters in unit files, in the order of the files."""
        return tuple(self.manifest.parameters)

    def kinds(self, name: str) -> tuple[str, ...]:
        """Which kinds of a parameter there are, stored as they are or encoded."""
        return tuple(dict.fromkeys(decoded_kinds(self._places(name))))

    def value(self, name: str) -> Tensor:
        """A parameter in its own dtype: mapped if a file holds that dtype, else converted from the master."""
        dtype = self.own_dtype(name)
        kind, exact = self._form(name, dtype)
        return self.tensor(name, kind) if exact else self.tensor(name, kind).to(dtype_of(dtype))

    def own_dtype(self, name: str) -> str:
        """Safetensors dtype of `value`."""
        stored = self.manifest.aliases.get(name, name)
        kind, _ = self._form(name, "")
        return self.manifest.dtypes.get(stored, self._dtype(name, kind))

    def is_in_place(self, name: str) -> bool:
        """Whether `value` needs no conversion; always true for tensors that are in no unit file."""
        stored = self.manifest.aliases.get(name, name)
        if stored not in self.manifest.parameters:
            return True
        kind, exact = self._form(name, self.own_dtype(name))
        return exact and kind in self._places(name)

    def _place(self, name: str, kind: str) -> tuple[FileRecord, TensorEntry]:
        places = self._places(name)
        if kind not in places:
            raise CheckpointError(f"{self.directory}: parameter {name!r} has {', '.join(places)}, no {kind!r}")
        return places[kind]

    def _dtype(self, name: str, kind: str) -> str:
        """Safetensors dtype of the values of a kind."""
        places = self._places(name)
        return places[kind][1].dtype if kind in places else DECODED_DTYPE

    def _encoded(self, name: str, kind: str) -> tuple[Encoding, dict[str, tuple[FileRecord, TensorEntry]]] | None:
        """How a kind of a parameter is decoded, and where its parts are; None if it is stored as it is.

        Raises:
            CheckpointError: A part is missing, or not as it should be.
        """
        places = self._places(name)
        encoding = None if kind in places else encoding_of(kind, places)
        if encoding is None:
            return None
        found = {part: places[part] for part in encoding.parts if part in places}
        shape = found[encoding.parts[0]][1].shape
        wanted = {part: STORED_DTYPE.get(part, "BF16") for part in encoding.parts}
        lacks = [part for part in encoding.needed if part not in found]
        fits = all(e.dtype == wanted[part] and e.shape == stored_shape(part, shape) for part, (_, e) in found.items())
        if lacks or not fits:
            raise CheckpointError(
                f"{self.directory}: {kind} of {name!r} cannot be decoded from {', '.join(found)}: "
                + (
                    f"{', '.join(lacks)} is missing"
                    if lacks
                    else "they are of other dtypes or shapes than they should be"
                )
            )
        return encoding, found

    def _places(self, name: str) -> Mapping[str, tuple[FileRecord, TensorEntry]]:
        places = self.manifest.parameters.get(self.manifest.aliases.get(name, name))
        if places is None:
            raise CheckpointError(f"{self.directory} holds no parameter {name!r}")
        return places

    def _form(self, name: str, dtype: str) -> tuple[str, bool]:
        """The kind that holds a parameter's value in ``dtype``, else the most exact one; and whether the dtype fits."""
        places = self._places(name)
        forms = [kind for kind in ("master", "param") if kind in decoded_kinds(places)]
        if not forms:
            raise CheckpointError(f"{self.directory}: parameter {name!r} has neither param nor master")
        exact = next((kind for kind in forms if self._dtype(name, kind) == dtype), None)
        return (forms[0], False) if exact is None else (exact, True)
