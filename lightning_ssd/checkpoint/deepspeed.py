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

from lightning_ssd.checkpoint.load import load_any
from lightning_ssd.checkpoint.manifest import OptimizerRecord
from lightning_ssd.checkpoint.sources import Held, Source, held_tensor, state_kinds
from lightning_ssd.errors import CheckpointError

_ZERO = "zero"
_VALUE = "fp32"
_STEP = "step"


def is_universal(path: str) -> bool:
    """Whether a folder is laid out as DeepSpeed's ``ds_to_universal`` writes it."""
    try:
        with os.scandir(os.path.join(path, _ZERO)) as found:
            return any(os.path.isfile(os.path.join(entry.path, f"{_VALUE}.pt")) for entry in found)
    except OSError:
        return False


def open_universal(path: str | os.PathLike[str], *, weights_only: bool = True) -> Source:
    """Open the folder; its optimizer has no groups, as the files do not tell them.

    Raises:
        CheckpointError: If a file is of another form.
    """
    where = os.path.abspath(os.fspath(path))
    source = Source(where)
    state: dict[str, dict[str, Any]] = {}
    zero = os.path.join(where, _ZERO)
    for name in sorted(os.listdir(zero)):
        folder = os.path.join(zero, name)
        if not os.path.isfile(os.path.join(folder, f"{_VALUE}.pt")):
            continue
        kinds = sorted(file[: -len(".pt")] for file in os.listdir(folder) if file.endswith(".pt"))
        # The float32 value is the master whatever the model computed in.
        found = {"master" if k == _VALUE else k: _held(folder, k, weights_only) for k in kinds if k != _STEP}
        shapes = {held.shape for held in found.values()}
        if len(shapes) != 1 or not all(held.dtype for held in found.values()):
            raise CheckpointError(f"{folder}: the states of one parameter have shapes {sorted(shapes)}")
        source.parameters[name] = found
        if len(found) > 1:
            state[name] = {_STEP: _step(folder, weights_only)} if _STEP in kinds else {}
    if state:
        source.optimizers = [OptimizerRecord("unknown", [], dict(state), state_kinds(source, state))]
    return source


def _held(folder: str, kind: str, weights_only: bool) -> Held:
    """One state; its file is opened now for the shape, and again when the tensor is wanted."""
    path = os.path.join(folder, f"{kind}.pt")
    tensor, is_flat = _load(path, weights_only)
    like = held_tensor(tensor)
    loaded: list[Tensor] = []

    def load() -> Tensor:
        loaded.append(_load(path, weights_only)[0])
        return loaded[-1]

    def drop() -> None:
        while loaded:
            held_tensor(loaded.pop()).drop()

    return Held(like.shape, like.dtype, load, drop, is_flat)


def _load(path: str, weights_only: bool) -> tuple[Tensor, bool]:
    """The tensor of a file, and whether it is flat."""
    content = load_any(path, path, weights_only)
    is_flat = isinstance(content, Tensor)
    tensor = content.get("param") if isinstance(content, Mapping) else content
    if not isinstance(tensor, Tensor) or (is_flat and tensor.dim() != 1):
        raise CheckpointError(f"{path} holds neither a dictionary with a tensor 'param' nor a flat tensor")
    return tensor, is_flat


def _step(folder: str, weights_only: bool) -> float:
    path = os.path.join(folder, f"{_STEP}.pt")
    content = load_any(path, path, weights_only)
    value = content.item() if isinstance(content, Tensor) and content.numel() == 1 else content
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{path} holds no number of steps")
    return float(value)
