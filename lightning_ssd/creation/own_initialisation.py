"""Models that initialise themselves as a whole, as those of transformers do: ``init_weights()`` after ``to_empty()``.

Such a model is taken at its word only as far as it can be checked: what it was to initialise carries a mark before, and
must not afterwards. Parameters too large to mark are zero before, being files without content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.sizes import MiB

_MARKED_NBYTES = MiB // 4
_NUM_LOOKED_AT = 1024


def initialises_whole(module: nn.Module) -> bool:
    """Whether ``module`` has the two methods of transformers: for a module inside, and for all of them."""
    return all(callable(getattr(module, name, None)) for name in ("_init_weights", "init_weights"))


def mark(tensor: Tensor) -> None:
    """Fill ``tensor``, which has no values yet, with what no initialisation makes."""
    if tensor.nbytes < _MARKED_NBYTES and _mark_of(tensor.dtype) is not None:
        tensor.data.fill_(_mark_of(tensor.dtype))


def require_initialised(name: str, module: nn.Module, tensors: Mapping[Tensor, int]) -> None:
    """Refuse what ``module`` has left without values.

    Args:
        name: Of the module.
        module: The module.
        tensors: What it was to initialise, with the ``_version`` of each before.

    Raises:
        ConfigurationError: Names them.
    """
    left = [n for n, tensor in _named_tensors(module) if tensor in tensors and _is_as_before(tensor, tensors[tensor])]
    for inner_name, inner in module.named_modules():
        attributes = (key for key, value in vars(inner).items() if isinstance(value, Tensor) and value.is_meta)
        left += [f"{inner_name}.{key}" for key in attributes]
    if left:
        raise ConfigurationError(
            f"module {name!r} ({type(module).__name__}) was made on the meta device, and its init_weights() leaves "
            f"{', '.join(left[:3])}{' and others' if len(left) > 3 else ''} without values; build it outside "
            "torch.device('meta') in configure_model (there, parameters are mapped to files as they are made)"
        )


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _is_as_before(tensor: Tensor, version: int) -> bool:
    first, before = tensor.detach().flatten()[:_NUM_LOOKED_AT], _mark_of(tensor.dtype)
    if tensor._version != version or first.numel() == 0 or before is None:
        return False
    if tensor.nbytes >= _MARKED_NBYTES:
        return not first.any()
    return bool((first != first).all() if isinstance(before, float) else (first == before).all())


def _mark_of(dtype: torch.dtype) -> Any:
    """NaN, or the smallest integer; None where every value is a likely one."""
    if dtype.is_floating_point:
        return float("nan")
    return None if dtype.is_complex or dtype == torch.bool else torch.iinfo(dtype).min
