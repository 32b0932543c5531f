"""Tensors on memory that we own, each with a storage of its own, and whether any of them is still alive."""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Views:
    """Tensors on one piece of memory, and whether any of them, or a view of one, is still alive.

    A tensor's storage keeps a ctypes array alive, and the array keeps ``memory`` alive. A weak reference to the array
    dies with the last tensor on the storage. So memory is reused only when no view of it is left: of the user,
    of autograd's saved tensors, or of a hook.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._refs: list[weakref.ref[Any]] = []
        self._holds: list[weakref.ref[Any]] = []

    def tensor(
        self, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> Tensor:
        """A tensor of ``shape`` whose storage starts at byte ``offset`` of the memory and ends where it ends.

        Args:
            offset: Where its first element lies.
            dtype: Its dtype.
            shape: Its shape.
            stride: Its strides in elements, which leave no gaps; None for those of the shape.
        """
        numel = math.prod(shape)
        with torch.inference_mode(False):
            if numel == 0:
                return torch.empty(tuple(shape), dtype=dtype)
            nbytes = numel * dtype.itemsize
            exported = (ctypes.c_char * nbytes).from_buffer(self._memory, offset)
            self._refs.append(weakref.ref(exported))
            flat = torch.frombuffer(exported, dtype=dtype, count=numel)
            return flat.view(tuple(shape)) if stride is None else flat.as_strided(tuple(shape), tuple(stride))

    def hold(self, offset: int) -> object:
        """An object that counts for `in_use` as a tensor does."""
        exported = ctypes.c_char.from_buffer(self._memory, offset)
        self._holds.append(weakref.ref(exported))
        return exported

    @property
    def in_use(self) -> bool:
        """Whether a tensor made here, a view of one, or an object of `hold` still exists."""
        self._holds = [ref for ref in self._holds if ref() is not None]
        return self.are_seen or bool(self._holds)

    @property
    def are_seen(self) -> bool:
        """Whether a tensor made here, or a view of one, still exists."""
        self._refs = [ref for ref in self._refs if ref() is not None]
        return bool(self._refs)


def address_of(memory: mmap.mmap) -> int:
    """Address of the first byte of a mapping. The caller keeps the mapping alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
