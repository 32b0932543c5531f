"""The buffers of a module that is run twice: the second run starts from the values before the first."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_ssd.errors import RecomputeError
from lightning_ssd.sizes import KiB

SMALL_NBYTES = 64 * KiB
"""Of buffers on a device no larger than this the old values are kept, whether they change or not."""


class _Comparison(NamedTuple):
    """Whether a buffer has changed although nothing says so, once the device has found out."""

    what: str
    has_changed: Tensor  # on the host, after `event`
    event: torch.cuda.Event


class WrittenBuffers:
    """Which buffers were seen to change in a forward of a module that has them."""

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
        self._comparisons: deque[_Comparison] = deque()

    def add(self, module: nn.Module, name: str) -> None:
        """It has changed."""
        self._names.setdefault(module, set()).add(name)

    def has(self, module: nn.Module, name: str) -> bool:
        """Whether it ever has."""
        return name in self._names.get(module, ())

    def compare_later(self, module: nn.Module, name: str, buffer: Tensor, old: Tensor) -> None:
        """Have the device compare a buffer whose old value is dropped; `check` raises if that was wrong."""
        differs = (buffer != old) & ((buffer == buffer) | (old == old))  # NaNs are equal
        has_changed = differs.any().to("cpu", non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(buffer.device))
        self._comparisons.append(_Comparison(f"buffer {name!r} of a {type(module).__name__}", has_changed, event))

    def check(self, *, is_end: bool = False) -> None:
        """Look at the comparisons that are done.

        Args:
            is_end: Wait for the others; else the host does not wait.

        Raises:
            RecomputeError: A buffer was written by ``.data`` for the first time after the first forward.
        """
        while self._comparisons and (is_end or self._comparisons[0].event.query()):  # type: ignore[no-untyped-call]
            comparison = self._comparisons.popleft()
            if is_end:
                comparison.event.synchronize()  # sync: the end of the run
            if comparison.has_changed:
                self._comparisons.clear()
                raise RecomputeError(
                    f"a forward wrote to {comparison.what} by .data, and its first one did not: the forward that "
                    "backward runs again began with the new value, so the gradients of that step are wrong; resume "
                    "from the last checkpoint with activations='keep', or write to the buffer by operations in place"
                )


class ModuleBuffers:
    """The values that the buffers of one module have before a forward.

    Args:
        module: The module.
        written: Is told what changed.
    """

    def __init__(self, module: nn.Module, written: WrittenBuffers) -> None:
        self._module = module
        self._written = written
        written.check()
        self._old = [(m, n, b, _version_of(b), b.clone()) for m, n, b in _buffers(module)]

    def end_forward(self, *, is_first: bool) -> None:
        """Drop the values of buffers that the forward did not change.

        On a device the host does not wait to compare values but in the first forward. In later ones a buffer counts as
        changed if its version says so, or if an earlier forward changed it, as batch norm does without a version. The
        device compares the others, and `WrittenBuffers.check` refuses later what was written by ``.data``.

        Args:
            is_first: Of this module.

        Raises:
            RecomputeError: See `WrittenBuffers.check`.
        """
        self._old = [entry for entry in self._old if self._may_have_changed(*entry, is_first=is_first)]

    def _may_have_changed(
        self, module: nn.Module, name: str, buffer: Tensor, version: int | None, old: Tensor, *, is_first: bool
    ) -> bool:
        if buffer.device.type != "cpu" and not is_first:
            is_known = self._written.has(module, name) or buffer.nbytes <= SMALL_NBYTES
            if is_known or version is None or buffer._version != version:
                return True
            self._written.compare_later(module, name, buffer, old)
            return False
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
