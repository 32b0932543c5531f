"""One unit: parameters that move together, and where their values are now."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_ssd.errors import ResidencyError
from lightning_ssd.io.engine import Transfer
from lightning_ssd.memory.pool import Buffer
from lightning_ssd.store.dtypes import dtype_of, name_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import Shape, UnitLayout, file_order, lay_out
from lightning_ssd.units import transforms
from lightning_ssd.units.device import DeviceCopy
from lightning_ssd.units.mapped import InMemoryParams, MappedParams
from lightning_ssd.units.partition import UnitSpec


class Residency(Enum):
    """Where a unit's parameter values are, beside the store."""

    ON_DISK = auto()  # no memory held; the store has the only copy
    READING = auto()  # one buffer, lent to the engine
    STAGED = auto()  # bytes in the buffer, no parameter views them: prefetched, or kept as cache
    RESIDENT = auto()  # parameters view device memory


_LEGAL = frozenset(
    {
        (Residency.ON_DISK, Residency.READING),
        (Residency.ON_DISK, Residency.STAGED),  # kept in memory from now on, or lent to an update
        (Residency.READING, Residency.STAGED),
        (Residency.READING, Residency.ON_DISK),  # the read failed
        (Residency.STAGED, Residency.RESIDENT),
        (Residency.STAGED, Residency.ON_DISK),
        (Residency.RESIDENT, Residency.STAGED),
        (Residency.RESIDENT, Residency.ON_DISK),
    }
)


class Waitable(Protocol):
    """An update of a unit that is still to be done; the unit's values are stale until then."""

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            BaseException: It failed.
        """
        ...


class Unit:
    """One unit of a model.

    Attributes:
        name: Unique name.
        names: Full names of the parameters, in file order.
        params: The parameters, in file order.
        layout: Of the kind ``param``: what a fetch reads.
        modules: Modules that need the unit in their forward.
        block: The repeated block it belongs to, or None.
        persistent: Stays resident to the end of the step once fetched.
        state: Where the values are. Only `move` assigns it.
        buffer: The host buffer, in every state but ON_DISK (on a GPU, in READING and STAGED only). In STAGED an update
            may have it (`UpdateTarget`).
        transfer: The read under way, in READING.
        generation: What the buffer holds or will hold; None while an update makes new values there.
        in_memory: One tensor per parameter, where the plan holds the unit in memory; it has no buffer and is never
            ON_DISK.
        device_copy: Its tensors where compute reads; on a GPU they may still be there when nobody uses them.
        update: Its pending update, or one that failed; None if there is none. Set under the lock of the cache.
        num_holds: How many users want it resident now.
        num_pins: How many updates have its buffer, or will want the bytes in it.
        at_rest: The mapping of its file while a parameter is awake outside a step.
        placeholders: What each parameter views at rest; NaN bytes that cost nothing.
        is_touched: Code outside its own modules can reach it while it is resident, and may hold views of it.
        seen: Checksums of its values when it became resident or touched; None if only ``versions`` are compared.
        versions: ``_version`` of each parameter when it became resident.
        num_writes: How often the user's writes to it at rest were found; its generation may be the same.
        is_handed_on: Its gradients of this step were handed to its optimizer in backward.
        is_ahead: It became resident after that, with the values of after the step.
        writes_itself: Its own modules write to it by ``.data`` in their forward, which no version tells.
    """

    def __init__(self, spec: UnitSpec, dtype: torch.dtype | None = None) -> None:
        self.name = spec.name
        if dtype is None or not spec.params[0].is_floating_point():
            dtype = spec.params[0].dtype
        by_name = dict(zip(spec.names, spec.params, strict=True))
        shapes = file_order((Shape(n, tuple(p.shape)) for n, p in by_name.items()), dtype.itemsize)
        self.names = tuple(shape.name for shape in shapes)
        self.params: tuple[nn.Parameter, ...] = tuple(by_name[name] for name in self.names)
        self.shapes = tuple(shapes)
        self.layout = lay_out(self.name, "param", shapes, name_of(dtype))
        self.modules = list(spec.modules)
        self.block = spec.block
        self.persistent = spec.persistent
        self.state = Residency.ON_DISK
        self.buffer: Buffer | None = None
        self.transfer: Transfer | None = None
        self.generation: Generation | None = None
        self.in_memory: tuple[Tensor, ...] | None = None
        self.device_copy: DeviceCopy | None = None
        self.update: Waitable | None = None
        self.num_holds = 0
        self.num_pins = 0
        self.mapped: MappedParams | InMemoryParams | None = None
        self.placeholders: tuple[Tensor, ...] = ()
        self.is_touched = False
        self.seen: tuple[int, ...] | None = None
        self.versions: tuple[int, ...] = ()
        self.num_writes = 0
        self.writes_itself = False
        self.is_handed_on = False
        self.is_ahead = False

    @property
    def is_viewed(self) -> bool:
        """Whether the unit, which is resident, must stay: the user can write through a view, or a graph holds it."""
        if not self.is_touched or self.device_copy is None:
            return False
        return any(map(is_held, self.params, self.device_copy.tensors)) or any(map(_is_saved, self.params))

    def current_versions(self) -> tuple[int, ...]:
        """``_version`` of each parameter; an operation in place on the parameter itself raises it."""
        return tuple(param._version for param in self.params)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters at rest."""
        return dtype_of(self.layout.dtype)

    def move(self, to: Residency) -> None:
        """Change ``state``.

        Raises:
            ResidencyError: If there is no such move.
        """
        if (self.state, to) not in _LEGAL:
            raise ResidencyError(f"unit {self.name!r}: {self.state.name} -> {to.name} is not a move")
        self.state = to

    def hold_in_memory(self, tensors: tuple[Tensor, ...]) -> None:
        """The plan holds the values in ``tensors``, one per parameter, from now on."""
        self.in_memory = tensors
        self.move(Residency.STAGED)

    def release_memory(self) -> None:
        """The plan holds the values in memory no longer."""
        self.in_memory = None
        self.move(Residency.ON_DISK)

    def wait_for_update(self) -> None:
        """Return when no update is pending.

        Raises:
            BaseException: An update of the model failed.
        """
        update = self.update  # the thread that updates may set it to None now
        if update is not None:
            update.wait()

    def layout_of(self, kind: str, dtype: str) -> UnitLayout:
        """Layout of another kind of this unit: the same parameters in the same order."""
        return lay_out(self.name, kind, self.shapes, dtype)

    def __repr__(self) -> str:
        return f"Unit({self.name!r}, {self.layout.numel} x {self.layout.dtype}, {self.state.name})"


def _is_saved(param: nn.Parameter) -> bool:
    """Whether a graph holds ``param`` itself, whose values then may not go: no hooks were set when it was saved.

    So it is under torch.func, which allows none, and under ``gathered()``.
    """
    accumulator = None  # of gradients; it holds the parameter too
    if param.requires_grad:
        # In inference mode no view of a parameter has a history.
        with torch._C.DisableTorchFunctionSubclass(), transforms.suspended(), torch.inference_mode(False):
            accumulator = torch.autograd.graph.get_gradient_edge(param)
    num_holders: int = param._use_count()  # type: ignore[attr-defined]
    return num_holders > (1 if accumulator is None else 2)


def is_held(param: nn.Parameter, tensor: Tensor) -> bool:
    """Whether anybody but these two has a tensor on the storage of ``tensor``, which ``param`` views or once viewed."""
    if not tensor.numel():
        return False
    storage = tensor.untyped_storage()
    # This storage object, the tensor, the one that it was made a view of, and the parameter.
    own = 2 + (tensor._base is not None) + (param.data_ptr() == tensor.data_ptr())
    return int(torch._C._storage_Use_Count(storage._cdata)) > own


def params_with_grad(units: Iterable[Unit]) -> Iterable[tuple[Unit, dict[int, Tensor]]]:
    """Units that have a visible gradient, with their gradients by parameter index."""
    for unit in units:
        grads = {i: p.grad for i, p in enumerate(unit.params) if p.grad is not None}
        if grads:
            yield unit, grads
