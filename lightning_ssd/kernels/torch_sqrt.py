"""Which square root of the native kernels has the bits of this machine's torch."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from lightning_ssd._extension import _native


@cache
def torch_sqrt() -> tuple[Any, int, int]:
    """How the native kernels take float32 square roots to have torch's bits.

    A torch with MKL uses MKL's square root, which is not correctly rounded and depends on the CPU. Any other torch uses
    the correctly rounded one.

    Returns:
        The form of the native kernels; address of MKL's square root; address of the function that limits MKL's
        threads. An address is 0 if torch has no such function.
    """
    address, set_threads = (_address_in_torch(name) for name in ("vmsSqrt", "MKL_Set_Num_Threads_Local"))
    return _native.matching_sqrt(address), address, set_threads


def _address_in_torch(name: str) -> int:
    """Address of a C function in torch's libraries, 0 if they have none of that name."""
    try:
        function = ctypes.CDLL(torch._C.__file__)[name]
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
