"""Bytes between a device and host memory. For tensors on the CPU these are plain copies, over when they return."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceCopies:
    """Copies on a stream of their own; compute waits for them, and they for it, by events."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def is_off_host(self, device: torch.device) -> bool:
        """Whether what lives on ``device`` takes no host memory."""
        return device.type != "cpu"

    def to_host(self, data: Tensor, memory: Tensor) -> torch.cuda.Event | None:
        """Start to copy ``data`` to ``memory``. The event tells when ``memory`` holds it; None: now.

        The caller may drop ``data`` at once.
        """
        if not data.is_cuda:
            memory.copy_(data)
            return None
        stream = self._stream(data.device)
        # What compute has queued so far wrote the data.
        stream.wait_stream(torch.cuda.current_stream(data.device))
        with torch.cuda.stream(stream):
            memory.copy_(data, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a waiting thread must not spin
            copied.record(stream)
        # Without this the allocator gives the memory to the next block while it is still being sent.
        data.record_stream(stream)
        return copied

    def to_device(self, memory: Tensor, data: Tensor) -> torch.cuda.Event | None:
        """Start to copy ``memory`` to ``data``, which compute on the current stream may use at once.

        The event tells when ``memory`` may be used for something else; None: now.
        """
        if not data.is_cuda:
            data.copy_(memory)
            return None
        stream = self._stream(data.device)
        compute = torch.cuda.current_stream(data.device)
        stream.wait_stream(compute)  # it may still use the memory that the allocator has just handed out
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
