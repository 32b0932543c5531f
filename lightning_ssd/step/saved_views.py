"""Saved tensors that view parameters: what stands for them while the memory of their unit is used for other units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ssd.units.resident_params import ResidentParam


class ParameterView:
    """Stands for a saved tensor that views a parameter: fetched again when backward needs it.

    Args:
        param: The parameter, which is resident.
        form: What `form_of` returns for the tensor.
    """

    __slots__ = ("__weakref__", "form", "generation", "index", "unit", "version")

    def __init__(self, param: ResidentParam, form: tuple[Any, ...]) -> None:
        self.unit = param.unit
        self.index = param.index
        self.form = form
        self.generation = param.device_copy.generation
        self.version = param.unit.params[param.index]._version

    def tensor(self) -> Tensor:
        """The tensor; the unit is resident."""
        size, stride, offset, dtype, is_conj, is_neg = self.form
        param = self.unit.params[self.index]
        unchanged(param, self.version)
        with torch.no_grad():
            flat = param.detach().as_strided((param.numel(),), (1,))  # in the order of its memory
            saved = (flat if dtype == flat.dtype else flat.view(dtype)).as_strided(size, stride, offset)
            # `conj()` and `imag` of what is conjugated are views with a mark, not other bytes.
            saved = torch._neg_view(saved) if is_neg else saved
            return saved.conj() if is_conj else saved


def form_of(tensor: Tensor) -> tuple[Any, ...]:
    """How ``tensor`` views its memory."""
    layout = tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype
    return *layout, tensor.is_conj(), tensor.is_neg()


def unchanged(tensor: Tensor, version: int | None) -> Tensor:
    """Return ``tensor``, whose ``_version`` was ``version`` when it was saved; None if that is not known.

    Raises:
        RuntimeError: It was changed in place since.
    """
    # Autograd does not check this itself for tensors that went through hooks.
    if version is not None and tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{tensor.dtype} {list(tensor.shape)} is at version {tensor._version}; expected version {version}"
        )
    return tensor
