"""A DeepSpeed universal checkpoint: a folder for each parameter, a torch file for each of its states.

``zero/NAME/fp32.pt``, ``exp_avg.pt`` and ``exp_avg_sq.pt`` each hold ``{"param": tensor, ...}`` (ZeRO stages 1 and 2),
or the bare tensor, flat (stage 3); ``step.pt``, if it is there, a number. The other files of such a checkpoint (module
buffers, frozen parameters, groups, schedulers) are pickles of DeepSpeed's own classes and are not read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_ssd.checkpoint.manifest import OptimizerRecord
from lightning_ssd.convert.sources import ImportSource, TensorRef, state_kinds, tensor_ref
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.folder import Folder, closing_fd
from lightning_ssd.io.safe_open import open_inside
from lightning_ssd.store.torch_file import load_any

_ZERO = "zero"
_VALUE = "fp32"
_STEP = "step"


def is_universal(path: str) -> bool:
    """Whether a folder is laid out as DeepSpeed's ``ds_to_universal`` writes it."""
    try:
        with os.scandir(os.path.join(path, _ZERO)) as found:
            return any(os.path.lexists(os.path.join(entry.path, f"{_VALUE}.pt")) for entry in found)
    except OSError:
        return False


def open_universal(path: str | os.PathLike[str], *, weights_only: bool = True) -> ImportSource:
    """Open the folder; its optimizer record has no groups, as the files do not hold them.

    Raises:
        CheckpointError: If a file is of another form.
    """
    where = os.path.abspath(os.fspath(path))
    files = _Files(where, weights_only)
    try:
        source = _opened(where, files)
    except BaseException:
        files.close()
        raise
    source.stack.callback(files.close)
    return source


def _opened(where: str, files: _Files) -> ImportSource:
    source = ImportSource(where)
    state: dict[str, dict[str, Any]] = {}
    zero = os.path.join(where, _ZERO)
    for name in sorted(os.listdir(zero)):
        folder = os.path.join(zero, name)
        if not os.path.lexists(os.path.join(folder, f"{_VALUE}.pt")):
            continue
        kinds = sorted(file[: -len(".pt")] for file in os.listdir(folder) if file.endswith(".pt"))
        # The float32 value is the master whatever the model computed in.
        found = {"master" if k == _VALUE else k: _tensor_ref(files, name, k) for k in kinds if k != _STEP}
        shapes = {ref.shape for ref in found.values()}
        if len(shapes) != 1 or not all(ref.dtype for ref in found.values()):
            raise CheckpointError(f"{folder}: the states of one parameter have shapes {sorted(shapes)}")
        source.parameters[name] = found
        if len(found) > 1:
            state[name] = {_STEP: _step(files, name)} if _STEP in kinds else {}
    if state:
        source.optimizers = [OptimizerRecord("unknown", [], dict(state), state_kinds(source, state))]
    return source


class _Files:
    """The files of the folder, opened inside it without following symlinks."""

    def __init__(self, where: str, weights_only: bool) -> None:
        self._folder = Folder.open(where)
        self._weights_only = weights_only

    def close(self) -> None:
        self._folder.close()

    def load(self, name: str, kind: str) -> tuple[Any, str]:
        """What a file holds, and its path."""
        path = f"{_ZERO}/{name}/{kind}.pt"
        where = os.path.join(self._folder.path, path)
        with closing_fd(open_inside(self._folder.fd, path, self._folder.path)) as fd:
            return load_any(f"/proc/self/fd/{fd}", where, self._weights_only), where


def _tensor_ref(files: _Files, name: str, kind: str) -> TensorRef:
    """A reference to one state; its file is opened now for the shape, and again by `load`."""
    tensor, is_flat = _load(files, name, kind)
    like = tensor_ref(tensor)
    loaded: list[Tensor] = []

    def load() -> Tensor:
        loaded.append(_load(files, name, kind)[0])
        return loaded[-1]

    def drop() -> None:
        while loaded:
            tensor_ref(loaded.pop()).drop()

    return TensorRef(like.shape, like.dtype, load, drop, is_flat)


def _load(files: _Files, name: str, kind: str) -> tuple[Tensor, bool]:
    """The tensor of a file, and whether it is flat."""
    content, path = files.load(name, kind)
    is_flat = isinstance(content, Tensor)
    tensor = content.get("param") if isinstance(content, Mapping) else content
    if not isinstance(tensor, Tensor) or (is_flat and tensor.dim() != 1):
        raise CheckpointError(f"{path} holds neither a dictionary with a tensor 'param' nor a flat tensor")
    return tensor, is_flat


def _step(files: _Files, name: str) -> float:
    content, path = files.load(name, _STEP)
    value = content.item() if isinstance(content, Tensor) and content.numel() == 1 else content
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{path} holds no number of steps")
    return float(value)
