"""The square root of this machine's torch: which of the native kernels' forms has its bits."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from lightning_ssd._extension import _native


@cache
def torch_sqrt() -> tuple[Any, int, int]:
    """How torch takes float32 square roots here: the form with its bits, and its own functions if no form has them.

    A torch with MKL uses MKL's root, which is not correctly rounded and depends on the CPU; any other uses the exact.

    Returns:
        The form; address of the root; address of what limits the threads that it may start, 0 if there is none.
    """
    address, set_threads = (_address_in_torch(name) for name in ("vmsSqrt", "MKL_Set_Num_Threads_Local"))
    return _native.matching_sqrt(address), address, set_threads


def _address_in_torch(name: str) -> int:
    """Where a C function is that torch brought along; 0 if it did not."""
    try:
        function = ctypes.CDLL(torch._C.__file__)[name]
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
