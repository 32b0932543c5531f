"""Asynchronous copies between a device and host memory; between tensors on the CPU, plain synchronous ones."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceCopies:
    """Copies on a CUDA stream of their own, ordered with the compute stream by events."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def is_off_host(self, device: torch.device) -> bool:
        """Whether tensors on ``device`` take no host memory."""
        return device.type != "cpu"

    def to_host(self, data: Tensor, memory: Tensor) -> torch.cuda.Event | None:
        """Start to copy ``data`` to ``memory``; the caller may drop ``data`` at once.

        Returns:
            The event after which ``memory`` has the values; None if it has them already.
        """
        if not data.is_cuda:
            memory.copy_(data)
            return None
        stream = self._stream(data.device)
        # The copy must follow the kernels that write the data.
        stream.wait_stream(torch.cuda.current_stream(data.device))
        with torch.cuda.stream(stream):
            memory.copy_(data, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # blocking: a waiting thread sleeps
            copied.record(stream)
        # The allocator must not reuse the memory before the copy is done.
        data.record_stream(stream)
        return copied

    def to_device(self, memory: Tensor, data: Tensor) -> torch.cuda.Event | None:
        """Start to copy ``memory`` to ``data``; kernels queued on the current stream afterwards may use ``data``.

        Returns:
            The event after which ``memory`` may be reused; None if it may be reused already.
        """
        if not data.is_cuda:
            data.copy_(memory)
            return None
        stream = self._stream(data.device)
        compute = torch.cuda.current_stream(data.device)
        stream.wait_stream(compute)  # whose kernels may still use the memory that the allocator has just handed out
        with torch.cuda.stream(stream):
            data.copy_(memory, non_blocking=True)
            copied: torch.cuda.Event = stream.record_event()
        data.record_stream(stream)
        compute.wait_event(copied)
        return copied

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]
