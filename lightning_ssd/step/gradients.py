"""Where gradients go: off the device as they arrive, then to their update or, until the step, to ``.grad``.

[Note: gradients] Where nothing reads gradients before the optimizer's step, a unit is updated as soon as all its
gradients are there (`Mode.UPDATE_IN_BACKWARD`), and their memory is freed. Otherwise they wait as ``.grad``
(`Mode.ACCUMULATE`): in memory or, past the budget, on a mapped file that the kernel may write back.

Off the device they are copied to the host as they arrive, and nobody waits for that before he must: the update for
those that are handed on, the end of backward for those that stay visible. ``.grad`` is on the host then. As autograd
could not add to it there, it is hidden when a further gradient comes, and the host adds the two: whoever runs the
backward, ``.grad`` has the sum when it returns.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_ssd.device.streams import HostStreams
from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io.scratch import Scratch
from lightning_ssd.memory.heap import HeapWatch
from lightning_ssd.step.grad_offload import GradOffloader, OffloadedGrad
from lightning_ssd.step.spilled_grads import SpilledGrads
from lightning_ssd.units.lazy_param import set_grad
from lightning_ssd.units.unit import Unit


class CompleteGrads(NamedTuple):
    """Gradients of one unit to which this backward adds nothing more.

    Attributes:
        unit: Whose they are.
        grads: By parameter index.
        land: Returns when they are there, called once by any thread before they are read; None if they are there.
    """

    unit: Unit
    grads: dict[int, Tensor]
    land: Callable[[], None] | None


class Mode(Enum):
    """What becomes of a gradient."""

    ACCUMULATE = auto()  # it stays ``.grad`` until the user's zero_grad
    UPDATE_IN_BACKWARD = auto()  # its unit is updated as soon as all of its gradients are there


class GradientStore:
    """Where the gradients of all units go.

    Args:
        scratch: Makes files on which waiting gradients are mapped; None keeps them in memory.
        off_device: Compute runs elsewhere than on the host: gradients are copied to the host as they arrive.
        offloader: Makes these copies.
        heap: Is told how much memory gradients took that came and went; None if that does not matter.
        waits_for_all_grads: All gradients wait: their places in mapped files are made before backward begins. Made as
            they arrive, their small objects would keep the holes in the heap apart; see [Note: holes].
        verify: Compare gradients that waited on disk with their checksums.
    """

    def __init__(
        self,
        scratch: Scratch | None,
        *,
        off_device: bool = False,
        offloader: GradOffloader | None = None,
        heap: HeapWatch | None = None,
        waits_for_all_grads: bool = False,
        verify: bool = False,
    ) -> None:
        self._verify = verify
        self.mode = Mode.ACCUMULATE
        self._off_device = off_device
        self._offloader = GradOffloader(HostStreams()) if offloader is None else offloader
        self._heap = heap
        self._is_gated = waits_for_all_grads
        self._arriving: dict[nn.Parameter, list[tuple[Unit, int, OffloadedGrad]]] = {}  # not yet in `_hidden`
        self._hidden: dict[nn.Parameter, Tensor] = {}  # off the device, sums that backward adds to
        self._scratch = scratch
        self._arrived: dict[str, set[int]] = {}  # parameters whose gradient this backward has brought, by unit
        self._uses: dict[str, int] = {}  # forwards of each unit whose backward has not ended
        self._users: Counter[tuple[Unit, nn.Module | None]] = Counter()  # the same, by who runs it
        self._uses_without_grad: Counter[str] = Counter()  # forwards of each unit in this step
        self._late: set[str] = set()  # units with a forward inside backward: of a reentrant checkpoint
        self._is_in_backward = False
        self._units: dict[str, Unit] = {}
        self._spills: dict[str, SpilledGrads] = {}
        self._numbers = itertools.count()

    def used(self, unit: Unit, module: nn.Module | None = None) -> None:
        """``unit`` runs a forward with grad, in ``module`` or by itself: one more backward will come."""
        self._uses[unit.name] = self._uses.get(unit.name, 0) + 1
        self._users[unit, module] += 1
        if self._is_in_backward:
            self._late.add(unit.name)

    def used_without_grad(self, unit: Unit) -> None:
        """``unit`` runs a forward without grad: a reentrant checkpoint may run it again, with grad, in backward."""
        self._uses_without_grad[unit.name] += 1

    def begin_step(self) -> None:
        """What ran without grad before has no part in what comes."""
        self._uses_without_grad.clear()
        self._is_in_backward = False

    @property
    def repeated_nbytes(self) -> int:
        """Gradients of parameters that forwards since the last backward have used several times, as far as we see it.

        Autograd holds them until it has that of the last use, and adds them up.
        """
        repeated: dict[nn.Parameter, int] = {}
        for (unit, module), times in self._users.items():
            # By itself: a function was given a parameter that some module has too. Small ones are not worth a thought.
            is_repeated = times > 1 if module is not None else self._uses[unit.name] > times and not unit.persistent
            mine = set(unit.params) if module is None else set(module.parameters()).intersection(unit.params)
            repeated |= {param: param.nbytes for param in mine if is_repeated and param.requires_grad}
        return sum(repeated.values())

    @property
    def is_off_device(self) -> bool:
        """Whether ``.grad`` is elsewhere than the gradients that autograd makes; then `hide` is called before each."""
        return self._off_device

    def hide(self, param: nn.Parameter) -> None:
        """Autograd is about to add to ``.grad``, which is on the host: until `end_backward` it has none."""
        with torch._C.DisableTorchFunctionSubclass():
            if param.grad is not None:
                self._hidden[param] = param.grad
                param.grad = None

    def arrive(self, unit: Unit, index: int, param: Tensor, *, is_needed: bool) -> CompleteGrads | None:
        """The gradient of parameter ``index`` is complete for this pass of autograd.

        Args:
            unit: Whose parameter it is.
            index: Of the parameter.
            param: The parameter.
            is_needed: Backward has yet to read values of the unit, so it must not be updated.

        Returns:
            The gradients of the unit, which the caller now owns, in `Mode.UPDATE_IN_BACKWARD` and if all are there.
        """
        grad = param.grad
        if grad is None:  # a hook of the user's has used it up, as an optimizer in backward does
            return None
        if grad.layout != torch.strided:
            raise ConfigurationError(
                f"parameter {unit.names[index]!r} has a sparse gradient; strategy='ssd_offload' needs dense ones: "
                "use sparse=False in its nn.Embedding"
            )
        self._units[unit.name] = unit
        arrived = self._arrived.setdefault(unit.name, set())
        arrived.add(index)
        if self._off_device:
            self._take_off(unit, index, grad)
        complete = None if is_needed else self.complete(unit)
        if self.mode is Mode.ACCUMULATE and not self._off_device:
            param.grad = self._kept(unit, index, grad)
        if self._heap is not None:
            self._heap.note_freed(grad.nbytes)
        return complete

    def complete(self, unit: Unit) -> CompleteGrads | None:
        """The gradients of ``unit``, as `arrive` returns them, if backward has no more use for its values."""
        arrived = self._arrived.get(unit.name)
        if self.mode is Mode.ACCUMULATE or not arrived or not self._is_complete(unit, len(arrived)):
            return None
        return self._take(unit)

    def end_backward(self) -> Iterator[CompleteGrads]:
        """No more gradients come from this backward: those of units that were not complete yet, one by one."""
        if self.mode is Mode.UPDATE_IN_BACKWARD:
            for name in list(self._arrived):
                yield self._take(self._units[name])
        self._arrived.clear()
        self._uses.clear()
        self._users.clear()
        self._late.clear()
        self._is_in_backward = False
        self.show()

    def show(self) -> None:
        """Backward is over, or failed: what was taken off the device is ``.grad``, as far as no update has it."""
        self._land()
        while self._hidden:
            set_grad(*self._hidden.popitem())

    @contextmanager
    def backward(self, units: Iterable[Unit], mode: Mode) -> Iterator[None]:
        """Around a backward of the Trainer's."""
        self.mode, self._is_in_backward = mode, True
        for spill in self._spills.values():
            spill.require_written()
        if not self._off_device:
            self._prepare_spills(units)
        try:
            yield
        finally:
            self.mode = Mode.ACCUMULATE

    def check(self, unit: Unit, grads: Mapping[int, Tensor], is_final: bool) -> None:
        """Refuse gradients of ``unit``, by parameter index, that waited on disk and were damaged there.

        Args:
            unit: Whose.
            grads: Those that are read next.
            is_final: They must be what they were at the call before; else they may have been changed.

        Raises:
            IOFailure: The system could not write some of them.
            CorruptionError: They are not what was written.
        """
        spill = self._spills.get(unit.name)
        if spill is not None:
            spill.require_written()
            for index, grad in grads.items():
                if self._verify and spill.holds(index, grad):
                    spill.check(index, grad, is_final=is_final)

    def close(self) -> None:
        """Let go of mapped files, and of copies from the device. Waiting gradients stay visible."""
        self._offloader.close()
        self._close_spills()

    def _close_spills(self) -> None:
        for spill in self._spills.values():
            spill.close()
        self._spills.clear()

    def inherit(self) -> None:
        """This is a forked process: gradients are the user's alone, and those on mapped files cannot be read."""
        for spill in self._spills.values():
            spill.refuse()
        self._close_spills()

    def _is_complete(self, unit: Unit, num_arrived: int) -> bool:
        """Whether nothing more can come for ``unit`` in this backward, nor be asked of it."""
        is_all = num_arrived == sum(p.requires_grad for p in unit.params)
        if unit.name in self._late and self._uses_without_grad[unit.name] > 1:
            return False  # autograd runs a backward of its own for each of these
        return is_all and self._uses.get(unit.name, 0) == 1

    def _take(self, unit: Unit) -> CompleteGrads:
        """The gradients of ``unit``; ``.grad`` is None from now on."""
        self._arrived.pop(unit.name, None)
        grads: dict[int, Tensor] = {}
        sums: list[tuple[Tensor, OffloadedGrad]] = []
        for index, param in enumerate(unit.params):
            grad = self._hidden.pop(param, param.grad)
            param.grad = None
            for _, _, landed in self._arriving.pop(param, ()):
                grad = landed.tensor if grad is None else grad
                sums.append((grad, landed))
            if grad is not None:
                grads[index] = grad
        return CompleteGrads(unit, grads, functools.partial(_add_up, sums) if sums else None)

    def _take_off(self, unit: Unit, index: int, grad: Tensor) -> None:
        param = unit.params[index]
        param.grad = None
        landed = self._offloader.offload(grad, self._land if self.mode is Mode.ACCUMULATE else lambda: None)
        self._arriving.setdefault(param, []).append((unit, index, landed))

    def _land(self) -> None:
        """Wait for all copies; gradients go where they can stay."""
        while self._arriving:
            param, arrivals = self._arriving.popitem()
            for unit, index, landed in arrivals:
                landed.wait()
                waiting = self._hidden.get(param)
                if waiting is not None:
                    waiting.add_(landed.tensor)
                else:
                    kept = (
                        landed.tensor
                        if self.mode is Mode.UPDATE_IN_BACKWARD
                        else self._kept(unit, index, landed.tensor)
                    )
                    self._hidden[param] = kept

    def _prepare_spills(self, units: Iterable[Unit]) -> None:
        if not self._is_gated or self._scratch is None:
            return
        for unit in units:
            if unit.name in self._uses:
                self._spill_of(unit, unit.dtype, self._scratch).prepare(
                    i for i, p in enumerate(unit.params) if p.requires_grad
                )

    def _kept(self, unit: Unit, index: int, grad: Tensor) -> Tensor:
        """``grad`` where it can wait: itself, or past the budget a copy in a mapped file."""
        if self._scratch is None or grad.numel() == 0:
            return grad
        spill = self._spill_of(unit, grad.dtype, self._scratch)
        if spill.holds(index, grad):
            return grad
        if spill.dtype != grad.dtype or spill.is_looked_at(index):
            self._spills.pop(unit.name).close()
            spill = self._spill_of(unit, grad.dtype, self._scratch)
        return spill.copy(index, grad)

    def _spill_of(self, unit: Unit, dtype: torch.dtype, scratch: Scratch) -> SpilledGrads:
        """The spill that ``unit`` has, else a new one for gradients of ``dtype``."""
        if unit.name not in self._spills:
            self._spills[unit.name] = SpilledGrads(scratch, next(self._numbers), unit, dtype)
        return self._spills[unit.name]


def _add_up(sums: list[tuple[Tensor, OffloadedGrad]]) -> None:
    for grad, landed in sums:
        landed.wait()
        if landed.tensor is not grad:
            grad.add_(landed.tensor)
