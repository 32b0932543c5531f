"""Gradients on their way off a GPU: copies run into memory of a pool while compute goes on; sizes in bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_ssd.device.streams import Event, Streams, WaitFor
from lightning_ssd.memory.pool import Pool
from lightning_ssd.store.strides import stride_of


@dataclass(eq=False)
class OffloadedGrad:
    """A gradient on the host, or on its way there.

    Attributes:
        tensor: Of the gradient's shape and dtype; holds it once `wait` has returned.
        copied: When it does; None if it does already.
    """

    tensor: Tensor
    copied: Event | None = None

    def wait(self) -> None:
        """Return when the tensor holds the gradient; any thread may ask."""
        if self.copied is not None:
            self.copied.wait(WaitFor.GRAD)  # sync: a copy from the device, and the compute before it


@dataclass(eq=False)
class OffloadedSums:
    """Gradients of one unit that are on their way to the host, or add to others that are there.

    Attributes:
        sums: What holds each sum, and what is added to it, which may be the same tensor.
    """

    sums: Sequence[tuple[Tensor, OffloadedGrad]]

    def wait(self) -> None:
        """Return when the sums are there; called once, by any thread."""
        for total, part in self.sums:
            part.wait()
            if part.tensor is not total:
                total.add_(part.tensor)


class GradOffloader:
    """Takes gradients off a device.

    Args:
        streams: Makes the copies.
        pool: Their memory; None waits for each copy, into memory that torch allocates.
        most_nbytes: Gradients that may be on their way. Each holds memory of the device until its copy is over; before
            there are more of them, compute waits for the oldest copy, which the host does not.
    """

    def __init__(self, streams: Streams, pool: Pool | None = None, *, most_nbytes: int = 0) -> None:
        self._streams = streams
        self._pool = pool
        self._most_nbytes = most_nbytes
        # With the gradient, which the copy reads; and its memory: who drops a gradient that nobody wants does not wait
        # for its copy, which would write later.
        self._on_the_way: deque[tuple[Event, Tensor, Tensor]] = deque()
        self._written: deque[tuple[Event, Tensor]] = deque()  # of which compute has the gradient's memory again

    def offload(self, grad: Tensor, make_room: Callable[[], None]) -> OffloadedGrad:
        """Start to copy ``grad``, which the caller may drop at once.

        Args:
            grad: On the device.
            make_room: Called where the pool has no room; lets go of what was offloaded earlier, if it can.
        """
        self._let_go()
        while self._on_the_way and sum(g.nbytes for _, g, _ in self._on_the_way) + grad.nbytes > self._most_nbytes:
            event, _, memory = self._on_the_way.popleft()
            self._streams.use(event)
            self._written.append((event, memory))
        landing = self._memory(grad)
        if landing is None:
            make_room()
            self._let_go()
            landing = self._memory(grad)
        if landing is None:
            self._streams.waits.add(WaitFor.GRAD_MEMORY)
            return OffloadedGrad(grad.detach().to("cpu"))  # sync: waits for the device
        grad = grad.detach()
        copied = self._streams.to_host(grad, landing)
        if copied is not None:
            self._on_the_way.append((copied, grad, landing))
        return OffloadedGrad(landing, copied)

    def close(self) -> None:
        """Return when no copy is on its way."""
        for event in [*(event for event, _ in self._written), *(event for event, _, _ in self._on_the_way)]:
            event.wait(WaitFor.END)  # sync: the oldest copy
        self._written.clear()
        self._on_the_way.clear()

    def _let_go(self) -> None:
        while self._written and self._written[0][0].query():
            self._written.popleft()
        while self._on_the_way and self._on_the_way[0][0].query():
            self._on_the_way.popleft()

    def _memory(self, grad: Tensor) -> Tensor | None:
        if self._pool is None:
            return None
        buffer = self._pool.try_lend(grad.nbytes, "a gradient")
        if buffer is None:
            return None
        memory = buffer.tensor(0, grad.dtype, grad.shape, stride_of(grad))
        self._pool.give_back(buffer)  # it lingers until the tensor dies, wherever that goes
        return memory
