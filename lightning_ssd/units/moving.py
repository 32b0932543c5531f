"""A module from one device to another, without its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ssd.units.lazy_param import by_loader


def move_all_but_params(root: nn.Module, device: torch.device) -> None:
    """Move buffers, and what modules have on a device beside them, such as the states of metrics, to ``device``.

    Each module's own ``_apply`` does it, as in ``Module.to``; it is given parameters too, and gets them back.
    """
    own = [tensor for param in root.parameters() for tensor in (param, param.grad) if tensor is not None]
    staying = set(map(id, own))

    def moved(tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in staying else tensor.to(device)

    with _plain([param for _, lazy in by_loader(list(root.parameters())) for param in lazy]):
        root._apply(moved)  # type: ignore[no-untyped-call]
    for module in root.modules():
        if hasattr(module, "_device") and isinstance(module._device, torch.device):
            module._device = device


@contextmanager
def _plain(lazy: list[nn.Parameter]) -> Iterator[None]:
    """Inside, lazy parameters are plain ones on their placeholders: ``_apply`` assigns ``.data``, and reads none."""
    classes = [type(param) for param in lazy]
    for param in lazy:
        param.__class__ = nn.Parameter
    try:
        yield
    finally:
        for param, cls in zip(lazy, classes, strict=True):
            param.__class__ = cls
