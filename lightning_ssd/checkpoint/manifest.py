"""What a checkpoint directory holds, as records. Opens nothing; sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lightning_ssd.codec.encodings import is_encoded
from lightning_ssd.errors import listed
from lightning_ssd.store.safetensors_header import TensorEntry

FORMAT = "lightning-ssd-checkpoint"
VERSION = 3
"""The newest version of the format that is read."""
PLAIN_VERSION = 2
"""What is written where all files have values as they are computed, in the order of their shapes, so that older
versions of the library read it."""
MANIFEST = "manifest.json"
STATE = "state.pt"
BUFFERS = "buffers.safetensors"
EXTRA_TENSORS = "extra_tensors.pt"
UNITS = "units"
LINK_FILE = "link.ckpt"
"""The small file of [Note: links] while it is in the folder; see [Note: commit]."""

NAMES_1 = {BUFFERS: "rest.safetensors", EXTRA_TENSORS: "odd.pt"}
OWN_FILES = (MANIFEST, STATE, BUFFERS, EXTRA_TENSORS, *NAMES_1.values(), LINK_FILE)
"""Names of the files next to ``units``, in every version of the format."""


@dataclass
class OptimizerRecord:
    """One optimizer, without its large tensors.

    Attributes:
        class_name: Qualified class name.
        param_groups: Hyper-parameters of each group; ``params`` is the list of parameter names, in order.
        state: Per parameter name, what is scalar: numbers, None, tensors of no dimension. Empty if nothing is; a
            parameter without an entry was never updated, whatever its unit files hold.
        kinds: Kinds of unit files that are this optimizer's states of the parameter's own shape.
        lacking: Per parameter name in ``state``, those of ``kinds`` that it does not have.
    """

    class_name: str
    param_groups: list[dict[str, Any]]
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    lacking: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class FileRecord:
    """One unit file of a checkpoint; ``path`` is relative to its directory.

    Attributes:
        renamed: Name of a parameter -> its name inside the file, where that is another: in the checkpoint of a model
            whose parameters were renamed, links to the old files.
    """

    path: str
    nbytes: int
    unit: str
    kind: str
    data_begin: int
    entries: tuple[TensorEntry, ...]
    checksums: tuple[int, ...] | None
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> str:
        """Its parameters, for a message."""
        return listed(entry.name for entry in self.entries)


def version_for(files: Sequence[FileRecord]) -> int:
    """The oldest version of the format that can say what ``files`` are: encodings and strides are new in version 3."""
    has_strides = any(entry.stride is not None for record in files for entry in record.entries)
    return VERSION if has_strides or is_encoded(record.kind for record in files) else PLAIN_VERSION


@dataclass(frozen=True)
class SmallFile:
    """A file with one checksum over all of it."""

    nbytes: int
    checksum: int


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    Attributes:
        step: Global step the checkpoint was taken at.
        created_at: UTC time in ISO format.
        versions: Versions of the libraries that wrote it.
        codec: Form of state on disk.
        world_size: Processes that wrote it.
        files: The unit files.
        dtypes: A parameter's own dtype, where it is not that of its one stored form.
        aliases: Further names of tied tensors, each with the name under which it is stored.
        optimizers: Records whose values are still in JSON form; ``CheckpointReader.optimizers`` decodes them.
        small_files: ``state.pt``, ``buffers.safetensors`` and, if there is one, ``extra_tensors.pt``; see `file_name`.
        names: The tensors of the module's state dict, in its order. The value of a tensor that is in ``buffers`` and in
            a unit file is the one in ``buffers``. None in a checkpoint that was imported or is older than this field:
            then the names are every parameter with a value, every alias and everything else in ``buffers``.
        version: Version of the format.
        id: 32 random hexadecimal digits that the small file has too ([Note: links]); none in older checkpoints.
    """

    step: int
    created_at: str
    versions: Mapping[str, str]
    codec: str
    world_size: int
    files: tuple[FileRecord, ...]
    dtypes: Mapping[str, str]
    aliases: Mapping[str, str]
    optimizers: tuple[OptimizerRecord, ...]
    small_files: Mapping[str, SmallFile]
    names: tuple[str, ...] | None = None
    version: int = VERSION
    id: str = ""

    @cached_property
    def parameters(self) -> Mapping[str, Mapping[str, tuple[FileRecord, TensorEntry]]]:
        """Where each kind of each parameter lies."""
        found: dict[str, dict[str, tuple[FileRecord, TensorEntry]]] = {}
        for record in self.files:
            for entry in record.entries:
                found.setdefault(entry.name, {})[record.kind] = (record, entry)
        return found

    def file_name(self, name: str) -> str:
        """What this version of the format calls the small file ``name``."""
        return NAMES_1.get(name, name) if self.version == 1 else name

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(r.nbytes for r in self.files) + sum(small.nbytes for small in self.small_files.values())
