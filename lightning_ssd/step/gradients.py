"""Where gradients go: off the device as they arrive, then to their update or, until the step, to ``.grad``.

[Note: gradients] Where nothing reads gradients before the optimizer's step, a backward has an optimizer: a unit is
updated as soon as all its gradients are there, and their memory is freed. Otherwise they wait as ``.grad``: in memory
or, past the budget, on a mapped file that the kernel may write back.

Off the device they are copied to the host as they arrive, and nobody waits for that before he must: the update for
those that are submitted, the end of backward for those that stay visible. ``.grad`` is on the host then. As autograd
could not add to it there, it is hidden when a further gradient comes, and the host adds the two: whoever runs the
backward, ``.grad`` has the sum when it returns.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_ssd.device.on_host import PLAIN, HostClasses, plain, set_grad
from lightning_ssd.device.streams import HostStreams
from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io.scratch import Scratch
from lightning_ssd.memory.heap import HeapWatch
from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.step.grad_offload import GradOffloader, OffloadedGrad, OffloadedSums
from lightning_ssd.step.spilled_grads import SpilledGrads
from lightning_ssd.units.unit import Unit

if TYPE_CHECKING:
    from lightning_ssd.step.backward import BackwardPass


class GradientStore:
    """Where the gradients of all units go.

    Args:
        scratch: Makes files on which waiting gradients are mapped; None keeps them in memory.
        off_device: Compute runs elsewhere than on the host: gradients are copied to the host as they arrive.
        on_host: What they are for code that looks at them.
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
        on_host: HostClasses = PLAIN,
        offloader: GradOffloader | None = None,
        heap: HeapWatch | None = None,
        waits_for_all_grads: bool = False,
        verify: bool = False,
    ) -> None:
        self._verify = verify
        self._optimizer: OptimizerAdapter | None = None  # updates units in the backward that runs
        self._hooks: dict[nn.Parameter, list[RemovableHandle]] = {}
        self._off_device = off_device
        self._on_host = on_host
        self._offloader = GradOffloader(HostStreams()) if offloader is None else offloader
        self._heap = heap
        self._waits_for_all_grads = waits_for_all_grads
        self._in_flight: dict[nn.Parameter, list[tuple[Unit, int, OffloadedGrad]]] = {}  # not yet in `_hidden`
        self._hidden: dict[nn.Parameter, Tensor] = {}  # off the device, sums that backward adds to
        self._scratch = scratch
        self._arrived: dict[Unit, set[int]] = {}  # parameters whose gradient this backward has brought, by unit
        self._uses: dict[str, int] = {}  # forwards of each unit whose backward has not ended
        self._users: Counter[tuple[Unit, nn.Module | None]] = Counter()  # the same, by who runs it
        self._uses_without_grad: Counter[str] = Counter()  # forwards of each unit in this step
        self._late: set[str] = set()  # units with a forward inside backward: of a reentrant checkpoint
        self._is_in_backward = False
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
        """Whether ``.grad`` is elsewhere than the gradients that autograd makes."""
        return self._off_device

    def watch(self, unit: Unit, backward: BackwardPass) -> None:
        """From now on take the gradients of ``unit``; parameters that start to require grad later are taken up then."""
        for index, param in enumerate(unit.params):
            if param.requires_grad and param not in self._hooks:
                after = param.register_post_accumulate_grad_hook(partial(self._arrive, unit, index, backward))  # type: ignore[no-untyped-call]
                self._hooks[param] = [after]
                if self._off_device:
                    before = param.register_hook(partial(self._hide, param, backward))  # type: ignore[no-untyped-call]
                    self._hooks[param].append(before)

    def unwatch(self) -> None:
        """Remove the hooks."""
        for handle in itertools.chain.from_iterable(self._hooks.values()):
            handle.remove()
        self._hooks.clear()

    def _hide(self, param: nn.Parameter, backward: BackwardPass, _: Tensor) -> None:
        """Autograd is about to add to ``.grad``, which is on the host: until `end_backward` it has none."""
        backward.note()
        with torch._C.DisableTorchFunctionSubclass():
            if param.grad is not None:
                self._hidden[param] = plain(param.grad)
                param.grad = None

    def _arrive(self, unit: Unit, index: int, backward: BackwardPass, param: Tensor) -> None:
        """The gradient of parameter ``index`` is complete for this pass of autograd."""
        backward.note()
        grad = param.grad
        if grad is None:  # a hook of the user's has used it up, as an optimizer in backward does
            return
        if grad.layout != torch.strided:
            raise ConfigurationError(
                f"parameter {unit.names[index]!r} has a sparse gradient; strategy='ssd_offload' needs dense ones: "
                "use sparse=False in its nn.Embedding"
            )
        self._arrived.setdefault(unit, set()).add(index)
        if grad.requires_grad:  # of a backward with create_graph=True; a copy would not lead back into its graph
            pass
        elif self._off_device:
            self._offload(unit, index, grad)
        elif self._optimizer is None:
            param.grad = self._held(unit, index, grad)
        if self._heap is not None:
            self._heap.note_freed(grad.nbytes)
        self.update_complete(unit)

    def update_complete(self, unit: Unit) -> None:
        """Submit the update of ``unit`` if all its gradients are there, and backward has no more use for its values."""
        arrived = self._arrived.get(unit)
        if self._optimizer is not None and arrived and not unit.saved_views and self._is_complete(unit, len(arrived)):
            self._update(unit, self._optimizer)

    def end_backward(self) -> None:
        """No more gradients come from this backward: units that were not complete yet are updated now."""
        if self._optimizer is not None:
            for unit in list(self._arrived):
                self._update(unit, self._optimizer)
        self._arrived.clear()
        self._uses.clear()
        self._users.clear()
        self._late.clear()
        self._is_in_backward = False
        self.show()

    def show(self) -> None:
        """Backward is over, or failed: what was taken off the device is ``.grad``, as far as no update has it."""
        self._end_copies()
        while self._hidden:
            set_grad(*self._hidden.popitem(), self._on_host)

    @contextmanager
    def backward(self, units: Iterable[Unit], optimizer: OptimizerAdapter | None) -> Iterator[None]:
        """Around a backward of the Trainer's: ``optimizer`` updates units in it; None: gradients wait."""
        self._optimizer, self._is_in_backward = optimizer, True
        for spill in self._spills.values():
            spill.require_written()
        if not self._off_device:
            self._prepare_spills(units)
        try:
            yield
        finally:
            self._optimizer = None

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

    def _update(self, unit: Unit, optimizer: OptimizerAdapter) -> None:
        """Submit the update of ``unit``; ``.grad`` of its parameters is None from now on."""
        self._arrived.pop(unit, None)
        grads: dict[int, Tensor] = {}
        sums: list[tuple[Tensor, OffloadedGrad]] = []
        for index, param in enumerate(unit.params):
            shown, param.grad = param.grad, None
            grad = self._hidden.pop(param, plain(shown) if self._off_device and shown is not None else shown)
            for _, _, copy in self._in_flight.pop(param, ()):
                grad = copy.tensor if grad is None else grad
                sums.append((grad, copy))
            if grad is not None:
                grads[index] = grad
        optimizer.update(unit, grads, is_last=True, in_flight=OffloadedSums(sums) if sums else None)
        unit.is_submitted = True  # what was written to it until now is in the store

    def _offload(self, unit: Unit, index: int, grad: Tensor) -> None:
        param, stride = unit.params[index], unit.shapes[index].stride
        param.grad = None
        if stride is not None and grad.stride() != stride:  # it was accumulated while the parameter was offloaded
            grad = grad.new_empty_strided(grad.shape, stride).copy_(grad)
        copy = self._offloader.offload(grad, self._end_copies if self._optimizer is None else lambda: None)
        self._in_flight.setdefault(param, []).append((unit, index, copy))

    def _end_copies(self) -> None:
        """Wait for all copies; gradients go where they can stay."""
        while self._in_flight:
            param, copies = self._in_flight.popitem()
            for unit, index, copy in copies:
                copy.wait()
                waiting = self._hidden.get(param)
                if waiting is not None:
                    waiting.add_(copy.tensor)
                elif self._optimizer is not None:
                    self._hidden[param] = copy.tensor
                else:
                    self._hidden[param] = self._held(unit, index, copy.tensor)

    def _prepare_spills(self, units: Iterable[Unit]) -> None:
        if not self._waits_for_all_grads or self._scratch is None:
            return
        for unit in units:
            if unit.name in self._uses:
                self._spill_of(unit, unit.dtype, self._scratch).prepare(
                    i for i, p in enumerate(unit.params) if p.requires_grad
                )

    def _held(self, unit: Unit, index: int, grad: Tensor) -> Tensor:
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
            number = next(self._numbers)
            self._spills[unit.name] = SpilledGrads(scratch, number, unit, dtype, verify=self._verify)
        return self._spills[unit.name]
