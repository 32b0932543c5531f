"""Where gradients of a GPU land: memory of a pool that copies run into while compute goes on; sizes in bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from lightning_ssd.memory.device_copies import DeviceCopies
from lightning_ssd.memory.pool import Pool
from lightning_ssd.units.device import Event


class OffloadedGrad:
    """A gradient on the host, or on its way there.

    Attributes:
        tensor: Of the gradient's shape and dtype; holds it once `wait` has returned.
    """

    def __init__(self, tensor: Tensor, event: Event | None = None) -> None:
        self.tensor = tensor
        self._event = event

    def wait(self) -> None:
        """Return when the tensor holds the gradient; any thread may ask."""
        if self._event is not None:
            self._event.synchronize()  # sync: a copy from the device, and the compute before it


class GradOffloader:
    """Takes gradients off a device.

    Args:
        pool: Their memory; None waits for each copy, into memory that torch allocates.
        most_nbytes: Gradients that may be on their way. Each holds memory of the device until its copy is over, and the
            host, which runs ahead of the device, would let them pile up.
        copies: Makes the copies.
    """

    def __init__(self, pool: Pool | None = None, *, most_nbytes: int = 0, copies: DeviceCopies | None = None) -> None:
        self._pool = pool
        self._most_nbytes = most_nbytes
        self._copies = DeviceCopies() if copies is None else copies
        # With the memory: who drops a gradient that nobody wants does not wait for its copy, which would write later.
        self._on_the_way: deque[tuple[Event, Tensor]] = deque()

    def offload(self, grad: Tensor, make_room: Callable[[], None]) -> OffloadedGrad:
        """Start to copy ``grad``, which the caller may drop at once.

        Args:
            grad: On the device.
            make_room: Called where the pool has no room; lets go of what landed earlier, if it can.
        """
        self._let_go()
        while self._on_the_way and sum(m.nbytes for _, m in self._on_the_way) + grad.nbytes > self._most_nbytes:
            self._on_the_way.popleft()[0].synchronize()  # sync: the oldest copy
        memory = self._memory(grad)
        if memory is None:
            make_room()
            self._let_go()
            memory = self._memory(grad)
        if memory is None:
            return OffloadedGrad(grad.detach().to("cpu"))  # sync: waits for the device
        event = self._copies.to_host(grad.detach(), memory)
        if event is not None:
            self._on_the_way.append((event, memory))
        return OffloadedGrad(memory, event)

    def close(self) -> None:
        """Return when no copy is on its way."""
        while self._on_the_way:
            self._on_the_way.popleft()[0].synchronize()  # sync: the oldest copy

    def _let_go(self) -> None:
        while self._on_the_way and self._on_the_way[0][0].query():
            self._on_the_way.popleft()

    def _memory(self, grad: Tensor) -> Tensor | None:
        if self._pool is None:
            return None
        buffer = self._pool.try_lend(grad.nbytes, "a gradient")
        if buffer is None:
            return None
        memory = buffer.tensor(0, grad.dtype, grad.shape)
        self._pool.give_back(buffer)  # it lingers until the tensor dies, wherever that goes
        return memory
