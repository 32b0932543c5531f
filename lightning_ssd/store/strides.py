"""The order in which the elements of a tensor lie in memory and in files. Pure arithmetic; counts are elements.

[Note: strides] A parameter keeps its strides, as ``channels_last`` or a transposed weight has them: kernels choose by
strides, and add in another order over others. Files, buffers, masters, states and gradients of it hold the elements in
the order of the parameter's own memory, without gaps, so that an update still works on flat ranges. In a unit file such
a tensor is listed with the shape that it has in that order; its own shape and its strides are in the metadata, from
which `store.mapped_safetensors` shows the tensor as it was. What writes other formats sees that tensor, and no order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Stride = tuple[int, ...]


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of a tensor, the outermost in memory first."""
    spread = [dim for dim, size in enumerate(shape) if size > 1]  # the stride of one element says nothing
    if all(stride[outer] >= stride[inner] for outer, inner in itertools.pairwise(spread)):
        return tuple(range(len(shape)))
    return tuple(sorted(range(len(shape)), key=lambda dim: -stride[dim]))


def memory_shape(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The shape of a tensor when its dimensions are brought into the order of its memory."""
    return tuple(shape[dim] for dim in memory_order(shape, stride))


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements lie one after the other, in some order of the dimensions: without gaps, none twice."""
    step = 1
    for dim in reversed(memory_order(shape, stride)) if math.prod(shape) else ():
        if shape[dim] > 1:
            if stride[dim] != step:
                return False
            step *= shape[dim]
    return True


def stride_of(tensor: Tensor) -> Stride | None:
    """The strides of ``tensor``; None if they are those of its shape, or leave gaps."""
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    if stride == _row_major(shape) or not tensor.numel() or not is_dense(shape, stride):
        return None
    return stride


def flatten(tensor: Tensor, shape: Sequence[int], stride: Stride | None) -> Tensor:
    """The elements of ``tensor``, 1D, in the order that memory of ``shape`` and ``stride`` has.

    Args:
        tensor: With as many elements, in the order of ``shape``. If its memory has the order, this is a view of it.
        shape: Of the memory.
        stride: Of the memory; None for that of the shape.
    """
    if stride is None:
        return tensor.reshape(-1)
    return tensor.reshape(tuple(shape)).permute(memory_order(shape, stride)).reshape(-1)


def unflatten(flat: Tensor, shape: Sequence[int], stride: Stride | None) -> Tensor:
    """``flat``, 1D, seen with ``shape`` and ``stride``."""
    return flat.view(tuple(shape)) if stride is None else flat.as_strided(tuple(shape), stride)


def _row_major(shape: Sequence[int]) -> Stride:
    """As torch gives them; a dimension without elements counts as one of one element."""
    sizes = [max(size, 1) for size in shape]
    return tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
