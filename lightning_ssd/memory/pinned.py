"""Host memory registered with CUDA (pinned), so that copies between it and a GPU are asynchronous."""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch

from lightning_ssd.sizes import fmt


class Pinned:
    """Memory that is registered with CUDA until `close`, or a warning that CUDA refused; then copies are slower.

    Args:
        address: Its first byte.
        nbytes: Its length.
        device: The GPU.

    Attributes:
        is_registered: Whether it is registered.
    """

    def __init__(self, address: int, nbytes: int, device: torch.device) -> None:
        self._address = address
        self._device = device
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        result = int(cudart.cudaHostRegister(address, nbytes, 0))
        self.is_registered = result == 0
        if not self.is_registered:
            _forget_error(device)
            warnings.warn(
                f"CUDA could not register {fmt(nbytes)} of host memory (error {result}): copies to and from the GPU "
                "will not run beside compute; a smaller host_memory, or a higher limit on locked memory, may help",
                stacklevel=2,
            )

    def close(self) -> None:
        """Unregister the memory when the device has finished all its work. A second call does nothing."""
        if not self.is_registered:
            return
        self.is_registered = False
        torch.cuda.synchronize(self._device)  # sync: a copy may still read or write the memory
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        result = int(cudart.cudaHostUnregister(self._address))
        if result != 0:
            _forget_error(self._device)
            warnings.warn(f"CUDA could not unregister host memory (error {result})", stacklevel=2)


def _forget_error(device: torch.device) -> None:
    """Clear the error of a failed call: CUDA keeps it, and torch would raise it at the next kernel."""
    with suppress(RuntimeError):
        torch.ones(1, device=device)
