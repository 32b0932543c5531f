"""A checkpoint as the dictionary that Lightning's Trainer saves and loads, with mapped tensors."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssd.checkpoint.contents import Contents
from lightning_ssd.checkpoint.directory import is_checkpoint
from lightning_ssd.checkpoint.link_file import mark_of
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.manifest import OptimizerRecord
from lightning_ssd.checkpoint.state_dict import StateDictView, split_buffers
from lightning_ssd.codec.encodings import decoded_kinds
from lightning_ssd.errors import CheckpointError
from lightning_ssd.store.layout import suffix_of
from lightning_ssd.store.mapped_safetensors import SeenFiles
from lightning_ssd.store.torch_file import load_pickle
from lightning_ssd.units.masters import master_of

MASTERS = "ssd_offload_masters"
"""Key under which an opened checkpoint carries float32 masters of 16-bit parameters, by parameter name."""

NAMES = "ssd_offload_parameter_names"
"""Key under which an opened checkpoint carries, for each optimizer, the names of each group's parameters."""

STATE_DICT_EXTRA = "state_dict_extra"
"""Key of the saved state under which the entries of the module's state dict lie that are no tensors."""

STATE_DICT_WHOLE = "state_dict_whole"
"""Key of the saved state under which a list holds what a hook put in the state dict's place, if that is no dictionary;
the list is empty if the hook took it out."""

STATE_DICT_METADATA = "state_dict_metadata"
"""Key of the saved state under which versions of the module's classes lie, if one is not 1."""

WHOLE_STATES = "whole_optimizer_states"
"""Key of the saved state under which lies, by number, what optimizers that are run whole gave as their state."""


def open_dictionary(path: Any, weights_only: bool | None) -> tuple[dict[str, Any], SeenFiles]:
    """Open a checkpoint with links, or a plain ``.ckpt``, as Lightning's dictionary with mapped tensors.

    All checksums of a directory are compared first. When all values have been used, the `SeenFiles` that is returned
    tells whether the files are still unchanged.

    Raises:
        CheckpointError: If it is incomplete or malformed.
        CorruptionError: If a byte differs from what was saved; names file, parameter and offset.
    """
    name = os.path.abspath(os.fspath(path))
    if not is_checkpoint(name) and mark_of(name) is None:
        if os.path.isdir(name):
            raise CheckpointError(
                f"{name!r} is a directory without a manifest: no checkpoint of strategy='ssd_offload', or one whose "
                "saving was interrupted"
            )
        return load_pickle(name, name, weights_only is not False), SeenFiles({})
    with CheckpointReader(name) as reader:  # mapped tensors outlive it
        reader.verify()
        content = dictionary_of(reader, StateDictView(reader, weights_only), weights_only)
        return content | own_entries(reader), reader.seen()


def dictionary_of(reader: Contents, tensors: Mapping[str, Tensor], weights_only: bool | None) -> dict[str, Any]:
    """Lightning's dictionary as it was saved; ``tensors`` are those of the module's state dict."""
    content = reader.state(weights_only)
    join_state_dict(content, tensors)
    whole = content.pop(WHOLE_STATES, {})
    # Older checkpoints, which have no id, do not say whether a hook has deleted an empty list.
    is_old = not reader.manifest.id and "lr_schedulers" in content
    if "optimizer_states" not in content and (reader.manifest.optimizers or is_old):
        states = optimizer_states(reader, weights_only)
        content["optimizer_states"] = [whole.get(index, state) for index, state in enumerate(states)]
    return content


def own_entries(reader: Contents) -> dict[str, Any]:
    """What a run of ours resumes from beside Lightning's dictionary: names of parameters, and masters."""
    names = [[list(group["params"]) for group in record.param_groups] for record in reader.manifest.optimizers]
    masters = {n: reader.tensor(n, "master") for n in reader.parameter_names if "master" in reader.kinds(n)}
    return {NAMES: names, MASTERS: masters}


def without_empty_loader_states(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` without the empty states of data loaders that our strategy made resumable.

    Their position is kept elsewhere. A plain Trainer has no stateful loader, and refuses a checkpoint with more states
    than stateful loaders.
    """
    path = ("loops", "fit_loop", "state_dict")
    levels: list[Any] = [content]
    for key in path:
        levels.append(levels[-1].get(key) if isinstance(levels[-1], Mapping) else None)
    loop = levels.pop()
    if not isinstance(loop, Mapping) or not isinstance(loop.get("combined_loader"), list):
        return dict(content)
    states = [state for state in loop["combined_loader"] if state != {}]
    changed: dict[str, Any] = {key: value for key, value in loop.items() if key != "combined_loader"}
    if states:
        changed["combined_loader"] = states
    for key, level in zip(reversed(path), reversed(levels), strict=True):  # the caller's own dictionaries stay
        changed = {**level, key: changed}
    return changed


def join_state_dict(content: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put the state dict back into a saved state: ``tensors``, and the entries that the state itself holds."""
    extra, whole = content.pop(STATE_DICT_EXTRA, {}), content.pop(STATE_DICT_WHOLE, None)
    metadata = content.pop(STATE_DICT_METADATA, None)
    if whole is None:
        content["state_dict"] = state = OrderedDict({**tensors, **extra})
        if metadata is not None:
            state._metadata = metadata  # type: ignore[attr-defined]  # where `Module.load_state_dict` looks for it
    elif whole:
        content["state_dict"] = whole[0]


def optimizer_states(reader: Contents, weights_only: bool | None) -> list[dict[str, Any]]:
    """State of each optimizer as ``torch.optim`` saves it, with mapped tensors; numbers run through the groups."""
    found = []
    for named in named_optimizer_states(reader, weights_only):
        numbers: dict[str, int] = {}
        groups = [
            {key: value for key, value in group.items() if key != "params"}  # which torch has last
            | {"params": [numbers.setdefault(name, len(numbers)) for name in group["params"]]}
            for group in named["param_groups"]
        ]
        state = {numbers[name]: entry for name, entry in named["state"].items()}
        found.append({"state": state, "param_groups": groups})
    return found


def named_optimizer_states(reader: Contents, weights_only: bool | None) -> list[dict[str, Any]]:
    """The same with names in place of numbers."""
    _, extra = split_buffers(reader, weights_only)
    records = reader.optimizers(weights_only)
    return [_named_state(reader, record, extra.get(index, {})) for index, record in enumerate(records)]


def _named_state(reader: Contents, record: OptimizerRecord, extra: Mapping[str, Any]) -> dict[str, Any]:
    """One optimizer's state; ``extra`` are tensors of another shape than their parameter's: name -> key -> tensor."""
    state: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for group in record.param_groups for name in group["params"]):
        entry = {key: _as_torch_keeps_it(key, value) for key, value in record.state.get(name, {}).items()}
        lacking = record.lacking.get(name, ())  # its unit's file of that kind has zeros for it
        there = decoded_kinds(reader.manifest.parameters.get(name, {}))
        for kind in record.kinds if name in record.state else ():
            if kind in there and kind not in lacking:
                entry[kind.removesuffix(suffix_of(kind))] = reader.tensor(name, kind)
        entry |= extra.get(name, {})
        if entry:
            state[name] = entry
    return {"state": state, "param_groups": record.param_groups}


def _as_torch_keeps_it(key: str, value: Any) -> Any:
    # torch.optim counts steps in a float32 tensor; a plain number is what files of old torch versions hold.
    if key == "step" and isinstance(value, int | float):
        return torch.tensor(float(value), dtype=torch.float32)
    return value


def with_masters(module: nn.Module, weights: Mapping[str, Any], masters: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """``weights`` with masters in place of the 16-bit values made from them, where ``module`` has float32.

    A value that was changed since it was rounded from its master stays; [Note: masters and values].
    """
    found: dict[str, Tensor] = {}
    params = dict(module.named_parameters())
    for name, master in masters.items():
        value, param = weights.get(name), params.get(name)
        if not isinstance(value, Tensor) or param is None:
            continue
        if value.dtype.itemsize < 4 <= param.dtype.itemsize and value.shape == master.shape:
            found[name] = master_of(value, master)
    if not found:
        return weights
    joined = copy(weights)  # with its versions
    joined.update(found)  # type: ignore[attr-defined]
    return joined
