"""The buffers of a module that is run twice: the second run starts from the values before the first."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ssd.sizes import KiB

SMALL_NBYTES = 64 * KiB
"""Of buffers on a device no larger than this the old values are kept, whether they change or not."""


class WrittenBuffers:
    """Which buffers were seen to change in a forward of a module that has them."""

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()

    def add(self, module: nn.Module, name: str) -> None:
        """It has changed."""
        self._names.setdefault(module, set()).add(name)

    def has(self, module: nn.Module, name: str) -> bool:
        """Whether it ever has."""
        return name in self._names.get(module, ())


class ModuleBuffers:
    """The values that the buffers of one module have before a forward.

    Args:
        module: The module.
        written: Is told what changed.
    """

    def __init__(self, module: nn.Module, written: WrittenBuffers) -> None:
        self._module = module
        self._written = written
        self._old = [(m, n, b, _version_of(b), b.clone()) for m, n, b in _buffers(module)]

    def end_forward(self, *, is_first: bool) -> None:
        """Drop the values of buffers that the forward did not change.

        On a device the host does not wait to compare values but in the first forward: later ones change a buffer if the
        version says so (what is written by ``.data`` and by batch norm has none), or if an earlier one did.

        Args:
            is_first: Of this module.
        """
        self._old = [entry for entry in self._old if self._may_have_changed(*entry, is_first=is_first)]

    def _may_have_changed(
        self, module: nn.Module, name: str, buffer: Tensor, version: int | None, old: Tensor, *, is_first: bool
    ) -> bool:
        if buffer.device.type != "cpu" and not is_first:
            is_known = self._written.has(module, name) or buffer.nbytes <= SMALL_NBYTES
            return is_known or version is None or buffer._version != version
        has_changed = not torch.equal(buffer, old)
        if has_changed:
            self._written.add(module, name)
        return has_changed

    def drop(self) -> None:
        """The module is not run again."""
        self._old.clear()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, buffers have the old values: copies, which the second run may change."""
        old = {(module, name): value for module, name, _, _, value in self._old}
        live = list(_buffers(self._module))
        for m, n, b in live:
            m._buffers[n] = old.get((m, n), b).clone()
        try:
            yield
        finally:
            for m, n, b in live:
                m._buffers[n] = b


def _version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for m in module.modules():
        for name, buffer in m._buffers.items():
            if buffer is not None:
                yield m, name, buffer
