"""The memory that a parameter views, and who holds it besides the unit that the parameter belongs to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_ssd.units import transforms


def is_saved(param: nn.Parameter) -> bool:
    """Whether a graph holds ``param`` itself, whose values then may not go: no hooks were set when it was saved.

    So it is under torch.func, which allows none, and under ``gathered()``.
    """
    accumulator = None  # of gradients; it holds the parameter too
    if param.requires_grad:
        # In inference mode no view of a parameter has a history.
        with torch._C.DisableTorchFunctionSubclass(), transforms.suspended(), torch.inference_mode(False):
            accumulator = torch.autograd.graph.get_gradient_edge(param)
    num_holders: int = param._use_count()  # type: ignore[attr-defined]
    return num_holders > (1 if accumulator is None else 2)


def is_held(param: nn.Parameter, tensor: Tensor, *, num_known: int = 0) -> bool:
    """Whether anybody but these two has a tensor on the storage of ``tensor``, which ``param`` views or once viewed.

    Args:
        param: The parameter.
        tensor: What it views or once viewed.
        num_known: Further tensors on the storage, which do not count.
    """
    if not tensor.numel():
        return False
    storage = tensor.untyped_storage()
    # This storage object, the tensor, the one that it was made a view of, and the parameter.
    own = 2 + num_known + (tensor._base is not None) + (param.data_ptr() == tensor.data_ptr())
    return int(torch._C._storage_Use_Count(storage._cdata)) > own


def give(param: nn.Parameter, data: Tensor, cls: type[nn.Parameter]) -> None:
    """Let ``param`` view ``data`` and be a ``cls``."""
    with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
        param.data = data
    param.__class__ = cls
