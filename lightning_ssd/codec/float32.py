"""The exact form of state on disk: masters and optimizer states as they are computed, one file per kind."""

from __future__ import annotations

NAME = "float32"
"""What a checkpoint's manifest calls this form."""


def state_dtype(param_dtype: str, *, keep_master: bool) -> str:
    """Dtype, as in safetensors files, of a unit's states and of the values that its update works on.

    Args:
        param_dtype: Dtype of the parameters.
        keep_master: 16-bit parameters have a float32 master; else they are updated in their own dtype.
    """
    return "F32" if keep_master and param_dtype in ("BF16", "F16") else param_dtype
