"""Safetensors names of torch dtypes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from lightning_ssd.errors import CheckpointError

TORCH_DTYPE: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "U16": torch.uint16,
        "I16": torch.int16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "F32": torch.float32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F64": torch.float64,
        "C64": torch.complex64,
    }
)
"""The torch dtype of each safetensors dtype."""

_NAME: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in TORCH_DTYPE.items()})


def name_of(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype.

    Raises:
        CheckpointError: The format has no such dtype.
    """
    name = _NAME.get(dtype)
    if name is None:
        raise CheckpointError(f"{dtype} cannot be stored: the safetensors format knows {', '.join(TORCH_DTYPE)}")
    return name


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name.

    Raises:
        CheckpointError: The name is unknown.
    """
    dtype = TORCH_DTYPE.get(name)
    if dtype is None:
        raise CheckpointError(f"dtype {name!r} is unknown; known are {', '.join(TORCH_DTYPE)}")
    return dtype
