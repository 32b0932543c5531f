"""Which blocks can be recomputed: decided in the first forward of each, by running it twice.

[Note: trial] The first frame of a block keeps the tensors that autograd saves, and runs its forward again at once. If
the second run saves the same values, the frame drops the tensors, and the block is recomputed from then on. If not, or
if the forward changed a tensor in place, the frame keeps them, and the block keeps its activations from then on. So no
gradient is computed from other values, and no more is in memory than in a recompute: the activations of one block.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_ssd.step.module_buffers import WrittenBuffers
from lightning_ssd.step.state_holders import Holder, surroundings

REMEDY = "set activations='keep' in the strategy to keep its activations instead"


class Verdicts:
    """Which blocks were tried, and with what result.

    Attributes:
        written_buffers: Which of their buffers change.
    """

    def __init__(self) -> None:
        self.written_buffers = WrittenBuffers()
        self._equal: set[nn.Module] = set()
        self._keeping: set[nn.Module] = set()
        self._around: dict[nn.Module, list[Holder]] = {}
        self._said: set[tuple[type, str]] = set()

    def is_equal(self, module: nn.Module) -> bool:
        """Whether a second run of ``module`` saved the same values as the first."""
        return module in self._equal

    def keeps(self, module: nn.Module) -> bool:
        """Whether ``module`` keeps its activations."""
        return module in self._keeping

    def pass_(self, module: nn.Module) -> None:
        """The second run of ``module`` saved the same values."""
        self._equal.add(module)

    def keep(self, module: nn.Module, name: str, reason: str) -> None:
        """``module`` keeps its activations from now on; warns once for each class and reason."""
        self._keeping.add(module)
        self._around.pop(module, None)
        if (type(module), reason) not in self._said:
            self._said.add((type(module), reason))
            warnings.warn(
                f"unit {name!r} ({type(module).__name__}) keeps its activations from now on, and so do others of its "
                f"class that do the same: its forward cannot be run twice, since {reason}",
                stacklevel=2,
            )

    def around(self, module: nn.Module) -> list[Holder]:
        """Variables from outside that the code of ``module`` uses; see `surroundings`."""
        if module not in self._around:
            self._around[module] = surroundings(module)
        return self._around[module]


class Trial:
    """Compares the tensors that autograd saves in the first and the second forward of a block.

    Args:
        keep: Returns what the frame holds of a saved tensor if the block turns out to keep its activations.
        place: Returns which parameter a tensor views, and how; None if it views none.

    Attributes:
        kept: What ``keep`` returned, in order.
    """

    def __init__(self, keep: Callable[[Tensor], object], place: Callable[[Tensor], object | None]) -> None:
        self.kept: list[object] = []
        self._keep = keep
        self._place = place
        self._first: list[tuple[object | None, Tensor]] = []
        self._num_compared = 0
        self._doubtful: list[tuple[int, Tensor]] = []

    def save(self, tensor: Tensor) -> None:
        """Record ``tensor``, which autograd saves in the first run."""
        self.kept.append(self._keep(tensor))
        place = self._place(tensor)
        # A view of a parameter is not held: it would keep the memory of a unit that is soon to be released.
        self._first.append((place, tensor.detach() if place is None else torch.empty(0)))

    def compare(self, tensor: Tensor) -> int:
        """Compare ``tensor``, which autograd saves in the second run; returns its index."""
        index = self._num_compared
        self._num_compared += 1
        if index < len(self._first):
            place, first = self._first[index]
            if self._place(tensor) != place or not (place is not None or is_equal(first, tensor.detach())):
                # Compared again at the end: batch norm saves its running mean before it changes it.
                self._doubtful.append((index, tensor.detach()))
        return index

    def difference(self) -> str | None:
        """How the second run differed from the first, None if it did not. Drops everything but `kept`."""
        first, self._first = self._first, []
        doubtful, self._doubtful = self._doubtful, []
        if self._num_compared != len(first):
            return f"{len(first)} tensors were saved, then {self._num_compared}"
        for index, second in doubtful:
            place, tensor = first[index]
            if place != self._place(second) or (place is None and not is_equal(tensor, second)):
                return f"tensor {index} of those that it saves had other values or another shape the second time"
        return None


def is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same layout and values; NaN equals NaN."""
    if type(a) is not type(b) or (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    inner_a, inner_b = _inner(a), _inner(b)
    if inner_a is not None and inner_b is not None:
        return len(inner_a) == len(inner_b) and all(map(is_equal, inner_a, inner_b))
    if a.stride() != b.stride():
        return False
    if torch.equal(a, b):
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _inner(tensor: Tensor) -> list[Tensor] | None:
    """The dense tensors that a sparse, nested or wrapper-subclass tensor consists of; None for a dense one."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return list(tensor.unbind()) if tensor.is_nested else None
