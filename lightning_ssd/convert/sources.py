"""Training states of any format as one class, `ImportSource`: names and shapes first, tensors on demand.

Torch files are loaded with ``weights_only=True`` unless the caller trusts them. Tensors are mapped, not read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ssd.checkpoint.dictionary import STATE_DICT_EXTRA
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.manifest import FileRecord, OptimizerRecord
from lightning_ssd.checkpoint.state_dict import VALUE_KINDS, StateDictView, split_buffers
from lightning_ssd.codec.encodings import DECODED_DTYPE
from lightning_ssd.convert.match import Shape
from lightning_ssd.convert.param_names import optimizer_from_torch
from lightning_ssd.errors import CheckpointError, listed
from lightning_ssd.store.dtypes import TORCH_DTYPE, name_of
from lightning_ssd.store.mapped_safetensors import drop_pages
from lightning_ssd.store.safetensors_header import TensorEntry
from lightning_ssd.store.strides import is_dense
from lightning_ssd.store.torch_file import load_pickle


@dataclass(frozen=True)
class TensorRef:
    """One tensor of a source.

    Attributes:
        shape: Its shape.
        dtype: Its safetensors dtype; empty if that format has none for it.
        load: Returns the tensor.
        drop: Frees its memory.
        is_flat: The source does not hold the tensor's shape; ``shape`` is its number of elements.
        place: The unit file that holds it and its entry there, if the source is a checkpoint of ours.
    """

    shape: Shape
    dtype: str
    load: Callable[[], Tensor]
    drop: Callable[[], None]
    is_flat: bool = False
    place: tuple[FileRecord, TensorEntry] | None = None


@dataclass
class ImportSource:
    """A training state to be imported.

    Attributes:
        where: What messages call it.
        parameters: Name -> kind -> tensor.
        buffers: Further tensors of the module.
        aliases: Further names of tied tensors -> name under which the tensor is stored.
        optimizers: Records. One has no groups if the source does not say which parameters were in which group.
        extra_state: Optimizer state of another shape than its parameter's: optimizer -> parameter -> key -> tensor.
        state: Lightning's state besides tensors; empty if the source is not from Lightning.
        reader: The open checkpoint, if it is one of ours.
        stack: Closes what the source holds open.
    """

    where: str
    parameters: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    buffers: dict[str, TensorRef] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    optimizers: list[OptimizerRecord] = field(default_factory=list)
    extra_state: dict[int, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    reader: CheckpointReader | None = None
    stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> ImportSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor of the module, by every name it has."""
        found = {name: self.value(name).shape for name in (*self.parameters, *self.buffers)}
        return found | {alias: found[stored] for alias, stored in self.aliases.items()}

    def value(self, name: str) -> TensorRef:
        """A tensor of the module in its most exact form: the master if there is one."""
        stored = self.aliases.get(name, name)
        if stored in self.buffers:
            return self.buffers[stored]
        kinds = self.parameters[stored]
        found = next((kinds[kind] for kind in ("master", "param") if kind in kinds), None)
        if found is None:
            raise CheckpointError(f"{self.where}: {name!r} has optimizer state but no value")
        return found

    def add(self, name: str, ref: TensorRef, kind: str = "param") -> None:
        """Add a tensor of the module: to the parameters if it is floating-point, else to the buffers."""
        if ref.dtype and torch.empty(0, dtype=TORCH_DTYPE[ref.dtype]).is_floating_point():
            self.parameters.setdefault(name, {})[kind] = ref
        else:
            self.buffers[name] = ref


def open_checkpoint(
    path: str | os.PathLike[str], *, weights_only: bool = True, with_state: bool = True
) -> ImportSource:
    """A checkpoint of ours.

    Raises:
        CheckpointError: If it cannot be read, or its state holds a class that is not allowed.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(CheckpointReader(path))
        source = ImportSource(reader.directory, reader=reader)
        view = StateDictView(reader, weights_only)
        buffers, source.extra_state = split_buffers(reader, weights_only)
        # A value that a hook replaced is in `buffers`; a parameter that it left out is stored for its optimizer only.
        valued = {n: p for n, p in reader.manifest.parameters.items() if n in view.shapes and n not in buffers}
        for name, places in valued.items():
            source.parameters[name] = {
                kind: TensorRef(
                    view.shapes[name],
                    places[kind][1].dtype if kind in places else DECODED_DTYPE,
                    partial(reader.tensor, name, kind),
                    partial(reader.drop_parameter, name),
                    place=places.get(kind),
                )
                for kind in reader.kinds(name)
            }
        source.buffers = {name: tensor_ref(tensor) for name, tensor in buffers.items()}
        source.aliases = dict(reader.manifest.aliases)
        source.optimizers = reader.optimizers(weights_only) if with_state else []
        lost = [name for name in reader.manifest.parameters if name not in valued]
        if lost and source.optimizers:
            raise CheckpointError(
                f"{reader.directory}: the values of {listed(lost)} were replaced when it was saved "
                "(weight averaging, or a hook that changes state_dict), so its optimizer state is not that of its "
                "weights: resume it with the Trainer that saved it, or export it and import the .ckpt"
            )
        source.state = reader.state(weights_only)
        source.stack = stack.pop_all()
    return source


def open_torch_file(
    path: str | os.PathLike[str], *, weights_only: bool = True, with_state: bool = True
) -> ImportSource:
    """A plain Lightning ``.ckpt``, or another torch file that holds a state dict.

    Raises:
        CheckpointError: If it holds no tensors, or optimizer state that cannot be given to parameters.
    """
    where = os.path.abspath(os.fspath(path))
    content = load_pickle(where, where, weights_only)
    is_checkpoint_file = isinstance(content.get("state_dict"), Mapping)
    states = content.pop("optimizer_states", []) if is_checkpoint_file else []
    tensors = content.pop("state_dict") if is_checkpoint_file else content
    source = ImportSource(where, state=content if is_checkpoint_file else {})
    first: dict[tuple[int, Shape, torch.dtype], str] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            if is_checkpoint_file:
                source.state.setdefault(STATE_DICT_EXTRA, {})[name] = value
            continue
        key = (value.data_ptr(), tuple(value.shape), value.dtype)
        stored = first.setdefault(key, name) if value.numel() and value.layout == torch.strided else name
        if stored == name:
            source.add(name, tensor_ref(value))
        else:
            source.aliases[name] = stored
    if not source.parameters and not source.buffers:
        raise CheckpointError(f"{where} holds no named tensors, neither at the top nor under 'state_dict'")
    for number, state in enumerate(states if with_state else ()):
        _add_optimizer(source, number, state)
    return source


def tensor_ref(tensor: Tensor) -> TensorRef:
    """A reference to a tensor in memory, usually a mapped one."""
    tensor = tensor.detach()
    dtype = name_of(tensor.dtype) if tensor.layout == torch.strided and tensor.dtype in TORCH_DTYPE.values() else ""

    def drop() -> None:
        if tensor.layout == torch.strided and is_dense(tensor.shape, tensor.stride()):
            drop_pages(tensor.data_ptr(), tensor.nbytes)

    return TensorRef(tuple(tensor.shape), dtype, lambda: tensor, drop)


def add_state(source: ImportSource, number: int, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Add one parameter's optimizer state by shape; return its scalars."""
    scalars: dict[str, Any] = {}
    shape = source.value(name).shape
    for key, value in values.items():
        if not isinstance(value, Tensor) or key == "step" or (value.dim() == 0 and shape):
            scalars[key] = value
        elif tuple(value.shape) == shape and value.is_floating_point():
            source.parameters[source.aliases.get(name, name)][key] = tensor_ref(value)
        else:
            source.extra_state.setdefault(number, {}).setdefault(name, {})[key] = value
    return scalars


def state_kinds(source: ImportSource, names: Mapping[str, Any]) -> list[str]:
    """Kinds of optimizer state that any of the parameters has."""
    return sorted({k for n in names for k in source.parameters[n] if k not in VALUE_KINDS})


def _add_optimizer(source: ImportSource, number: int, content: Mapping[str, Any]) -> None:
    shapes = {name: kinds["param"].shape for name, kinds in source.parameters.items()}
    groups, by_name = optimizer_from_torch(content, shapes, f"{source.where}: optimizer {number}")
    state = {name: add_state(source, number, name, values) for name, values in by_name.items()}
    source.optimizers.append(OptimizerRecord("unknown", groups, state, state_kinds(source, state)))
