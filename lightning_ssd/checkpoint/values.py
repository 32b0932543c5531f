"""Optimizer hyper-parameters as JSON and back, without loss: tuples, infinities and scalar tensors survive.

Values that JSON cannot hold are pickled in ``state.pt``; the JSON then holds a reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lightning_ssd.checkpoint.manifest import OptimizerRecord
from lightning_ssd.errors import CheckpointError
from lightning_ssd.store.dtypes import TORCH_DTYPE, dtype_of, name_of

_MAX_DEPTH = 32


def encode_optimizer(record: OptimizerRecord, index: int, pickled: dict[str, Any]) -> OptimizerRecord:
    """The record with JSON values only; values that JSON cannot hold are added to ``pickled``."""
    groups: list[dict[str, Any]] = []
    for i, group in enumerate(record.param_groups):
        where = f"optimizer.{index}.param_groups.{i}"
        groups.append(
            {
                key: list(value) if key == "params" else _encode(value, f"{where}.{key}", pickled)
                for key, value in group.items()
            }
        )
    state = {
        name: {key: _encode(value, f"optimizer.{index}.state.{name}.{key}", pickled) for key, value in scalars.items()}
        for name, scalars in record.state.items()
    }
    return OptimizerRecord(record.class_name, groups, state, list(record.kinds), dict(record.lacking))


def decode_optimizer(record: OptimizerRecord, pickled: Mapping[str, Any]) -> OptimizerRecord:
    """Undo `encode_optimizer`.

    Raises:
        CheckpointError: If a value has a form that `encode_optimizer` does not write.
    """
    groups = [
        {key: list(value) if key == "params" else _decode(value, pickled) for key, value in group.items()}
        for group in record.param_groups
    ]
    state = {
        name: {key: _decode(value, pickled) for key, value in scalars.items()} for name, scalars in record.state.items()
    }
    return OptimizerRecord(record.class_name, groups, state, list(record.kinds), dict(record.lacking))


def needs_pickled(record: OptimizerRecord) -> bool:
    """Whether decoding the record needs ``state.pt``."""
    values = [value for group in record.param_groups for value in group.values()]
    values += [value for scalars in record.state.values() for value in scalars.values()]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if "pickled" in value:
                return True
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
    return False


def _encode(value: Any, where: str, pickled: dict[str, Any]) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return _encode_float(float(value))
    if isinstance(value, Tensor) and value.dim() == 0 and value.dtype in TORCH_DTYPE.values():
        if not value.is_complex():
            item = value.item()
            return {"tensor": [name_of(value.dtype), _encode_float(item) if isinstance(item, float) else item]}
    elif type(value) in (list, tuple):
        items = [_encode(item, f"{where}.{i}", pickled) for i, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    elif type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _encode(item, f"{where}.{key}", pickled) for key, item in value.items()}}
    pickled[where] = value
    return {"pickled": where}


def _encode_float(value: float) -> float | dict[str, str]:
    return value if math.isfinite(value) else {"float": str(value)}


def _decode(value: Any, pickled: Mapping[str, Any], depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"optimizer values of the manifest are nested more than {_MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_decode(item, pickled, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if tag == "tuple" and isinstance(content, list):
            return tuple(_decode(item, pickled, depth + 1) for item in content)
        if tag == "dict" and isinstance(content, dict):
            return {key: _decode(item, pickled, depth + 1) for key, item in content.items()}
        if tag == "pickled" and isinstance(content, str) and content in pickled:
            return pickled[content]
        if tag == "tensor" and isinstance(content, list) and len(content) == 2:
            return _decode_tensor(str(content[0]), _decode(content[1], pickled, depth + 1))
    raise CheckpointError(f"the manifest holds an optimizer value of unknown form: {str(value)[:200]}")


def _decode_tensor(dtype: str, item: Any) -> Tensor:
    if not isinstance(item, int | float):
        raise CheckpointError(f"the manifest holds a scalar tensor of value {str(item)[:200]!r}")
    try:
        with torch.inference_mode(False):
            return torch.tensor(item, dtype=dtype_of(dtype))
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:
        raise CheckpointError(f"the manifest holds a scalar tensor of {dtype} that is none: {error}") from error
