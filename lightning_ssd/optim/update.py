"""One update of one unit, from the step that asks for it until its new values are the current ones.

[Note: pending update] A `PendingUpdate` lies on its unit (``unit.update``) until it is done, and as
long as it does the unit's values are stale. Its states:

    QUEUED -> RUNNING -> WRITING -> DONE      an update that writes files; [Note: write-behind]
    QUEUED -> RUNNING -> DONE                 all of its tensors are in memory
    QUEUED, RUNNING, WRITING -> FAILED        the generations before the update stay the current ones

DONE and FAILED are final. After a failure the step cannot be completed: the failed update lies on every unit of the
model then, so whoever wants a unit gets the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ssd.errors import NonFiniteGradientError, ResidencyError
from lightning_ssd.kernels import api as kernels
from lightning_ssd.optim.rules import Options, Rule
from lightning_ssd.units.host_copy import UpdateTarget
from lightning_ssd.units.param_cache import ParamCache
from lightning_ssd.units.unit import Unit, Waitable

if TYPE_CHECKING:
    from lightning_ssd.optim.pipeline import UpdatePipeline
    from lightning_ssd.optim.updater import Updater


class UpdateState(Enum):
    """Where an update is on its way."""

    QUEUED = auto()  # waits for its turn
    RUNNING = auto()  # reads state, computes, starts writes
    WRITING = auto()  # all is computed; the last chunks are on their way to the disk
    DONE = auto()  # the new generations are the current ones
    FAILED = auto()  # the generations before the update are the current ones


_MOVES = frozenset(
    {
        (UpdateState.QUEUED, UpdateState.RUNNING),
        (UpdateState.QUEUED, UpdateState.FAILED),
        (UpdateState.RUNNING, UpdateState.WRITING),
        (UpdateState.RUNNING, UpdateState.DONE),
        (UpdateState.RUNNING, UpdateState.FAILED),
        (UpdateState.WRITING, UpdateState.DONE),
        (UpdateState.WRITING, UpdateState.FAILED),
    }
)


@dataclass
class ParameterUpdate:
    """One parameter's part in an update.

    Attributes:
        grad: Gradient, of the parameter's shape.
        version: Its version counter at the step: it must not change before the update has run.
        options: Hyper-parameters of its group at the step.
        scalars: What the rule keeps beside tensors; changed in place.
        initialised: Kinds of which this parameter has a state; changed in place.
    """

    grad: Tensor
    version: int
    options: Options
    scalars: dict[str, Any]
    initialised: set[str]


@dataclass(frozen=True)
class Updates:
    """What updates run with, while steps can be made.

    Attributes:
        pipeline: Runs one.
        cache: Has the units' values in memory.
        updater: Runs them in order.
    """

    pipeline: UpdatePipeline
    cache: ParamCache
    updater: Updater


class PendingUpdate:
    """One update of one unit; [Note: pending update].

    The thread that trains makes it, and waits for it; the thread of the `Updater` calls the rest. If the rule updates
    the parameters themselves and they are in memory, they are pinned there until the update runs.

    Args:
        updates: What it runs with.
        unit: What it updates.
        rule: How.
        parts: Gradients and hyper-parameters by parameter index; empty once it has run.
        suffix: Of the kinds that belong to the optimizer; [Note: suffix].
        is_last: Nobody else holds the gradients: their memory counts.
        in_flight: Copies of gradients to the host, for which the thread that updates waits; None if all are there.

    Attributes:
        state: Where it is on its way.
        nbytes: Bytes of gradients that nobody else holds.
        position: Place of the unit in the next forward; the lowest is updated first.
    """

    def __init__(
        self,
        updates: Updates,
        unit: Unit,
        rule: Rule,
        parts: Mapping[int, ParameterUpdate],
        *,
        suffix: str = "",
        is_last: bool = False,
        in_flight: Waitable | None = None,
    ) -> None:
        self.unit = unit
        self.rule = rule
        self.parts = parts
        self.suffix = suffix
        self.state = UpdateState.QUEUED
        self.nbytes = sum(part.grad.nbytes for part in parts.values()) if is_last else 0
        self._updates = updates
        self._in_flight = in_flight
        self._is_pinned = updates.cache.prepare_update(unit)
        self.position = updates.cache.order.position(unit.name, "train")

    def __repr__(self) -> str:
        return f"PendingUpdate({self.unit.name!r}, {self.state.name})"

    @property
    def is_over(self) -> bool:
        """Whether it is done, or has failed."""
        return self.state in (UpdateState.DONE, UpdateState.FAILED)

    @property
    def is_idle(self) -> bool:
        """Whether compute does not read the unit where the update would change it."""
        return self.unit.device_copy is None or not self._updates.cache.keeps_buffer

    @property
    def changes_memory(self) -> bool:
        """Whether the unit's only values are in memory: the update has to wait until it is idle.

        Any other update can run beside compute, which costs a copy of the values.
        """
        return self.unit.in_memory is not None

    def wait(self) -> None:
        """Return when the update is done.

        Raises:
            SSDOffloadError: This update failed, or one before it; any error of the user's optimizer class too.
        """
        self._updates.updater.wait(self)

    def run(self) -> None:
        """Compute new values and start to write them; the last writes may be under way when this returns.

        Raises:
            NonFiniteGradientError: A gradient that came from a device holds NaN or Inf.
            ResidencyError: A gradient was changed in place since the step.
            CorruptionError: A gradient that waited on disk was damaged.
            IOFailure: The disk failed, under this update or under the writes of the one before it.
        """
        self._move(UpdateState.RUNNING)
        try:
            self._updates.pipeline.update(self, self._reserve())
        except BaseException:
            if self.state is UpdateState.RUNNING:  # not if it was done before the error
                self._move(UpdateState.FAILED)
            raise
        finally:
            self._in_flight, self.parts = None, {}  # the gradients' memory goes now
        if self.state is UpdateState.RUNNING:
            self._move(UpdateState.WRITING)

    def finish(self) -> None:
        """Return when the last writes are on disk and the update is done.

        Raises:
            IOFailure: The disk failed; the generations before the update are still the current ones.
        """
        self._updates.pipeline.finish()

    def complete(self) -> None:
        """The new generations are the current ones: called by the pipeline."""
        lock = self._updates.updater.lock
        with lock:
            self._move(UpdateState.DONE)
            self.unit.update = None
            lock.notify_all()
        self._updates.cache.updated(self.unit)

    def cancel(self) -> None:
        """Do not run it: an update before it failed."""
        if self.state is not UpdateState.QUEUED:
            raise ResidencyError(f"the update of unit {self.unit.name!r} is {self.state.name} and cannot be cancelled")
        self._move(UpdateState.FAILED)
        self._unpin()
        self._in_flight, self.parts = None, {}

    def fail(self) -> None:
        """It failed, or the bytes that it wrote did: whoever wants any unit of the model is told from now on."""
        if not self.is_over:
            self._move(UpdateState.FAILED)
        for unit in self._updates.cache.units:
            unit.update = self

    def _reserve(self) -> UpdateTarget | None:
        """Wait for the gradients, check them, and take the unit's buffer."""
        unit, grads = self.unit, {index: part.grad for index, part in self.parts.items()}
        try:
            if unit.spilled_grads is not None:  # before what is in flight is added to them
                unit.spilled_grads.check(grads, is_final=True)
            if self._in_flight is not None:
                self._in_flight.wait()
                require_finite(unit, grads)
                for part in self.parts.values():
                    part.version = part.grad._version  # what was in flight may have been added to it
        except BaseException:
            self._unpin()
            raise
        is_pinned, self._is_pinned = self._is_pinned, False
        return self._updates.cache.reserve(unit, is_pinned=is_pinned)

    def _unpin(self) -> None:
        if self._is_pinned:
            self._is_pinned = False
            self._updates.cache.unpin(self.unit)

    def _move(self, to: UpdateState) -> None:
        if (self.state, to) not in _MOVES:
            raise ResidencyError(f"update of unit {self.unit.name!r}: {self.state.name} -> {to.name} is not a move")
        self.state = to


def require_finite(unit: Unit, grads: Mapping[int, Tensor]) -> None:
    """Refuse gradients, by parameter index, that hold NaN or Inf.

    Raises:
        NonFiniteGradientError: Names the parameter.
    """
    for index, grad in grads.items():
        flat = unit.layout.entries[index].flatten(grad.detach())
        fast = flat.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not (kernels.sum_of_squares(flat)[1] if fast else bool(torch.isfinite(flat).all())):
            raise NonFiniteGradientError(
                f"the gradient of parameter {unit.names[index]!r} holds NaN or Inf; its unit was not updated and "
                "the last checkpoint is whole: resume from it with a lower learning rate, gradient clipping, or "
                "the batch that caused this left out"
            )
