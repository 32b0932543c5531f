"""Recompute: of a block's forward only the inputs are saved; backward runs it again for the tensors autograd saved.

[Note: recompute] In a forward under a `Frame`, each tensor that autograd saves is packed as its index. The first unpack
in backward calls the module again, with the same inputs, generators, autocast state, Python objects ([Note: Python
state]) and buffers, and through the same hooks, which fetch the same units. The n-th tensor that autograd saves then
takes the place of the n-th of the first run. The second run's own graph is dropped, so the run may start from other
tensors with the same values: large inputs are in the activation store, [Note: saved inputs]. An exception ends the
second run after the last saved tensor, since nothing needs the operations behind it (torch.utils.checkpoint stops early
too). The first forward of a block decides whether it can be recomputed, [Note: trial].

Method: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lightning_ssd.activations.store import ActivationStore, FrameInputs
from lightning_ssd.errors import RecomputeError, SSDOffloadError
from lightning_ssd.step.ambient import Ambient
from lightning_ssd.step.module_buffers import ModuleBuffers
from lightning_ssd.step.python_state import PythonState, mapped
from lightning_ssd.step.trial import REMEDY, Trial, Verdicts
from lightning_ssd.units.lazy_param import tensors_in
from lightning_ssd.units.unit import Unit

if TYPE_CHECKING:
    from lightning_ssd.step.backward import BackwardPass


class Frame:
    """One forward of one module, which is to be run again in backward; see [Note: recompute].

    Args:
        name: The unit's name, for messages.
        module: The module, which is called again.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        device: Where it computes.
        units: The units that it needs, which are resident.
        inside: Those that modules in it need.
        backward: Fetches them again.
        verdicts: Which modules can be run again; the frame adds what it finds.

    Attributes:
        opaque: Why the module cannot be run again, if that is known before it runs; None otherwise.
        is_kept: The frame keeps what autograd saved, since its module cannot be run again.
        is_trying: The second run of [Note: trial] is in progress.
        is_stopped: The second run is ending early, since it has saved the last tensor.
        error: What one of our hooks raised while it was; torch turns that into a warning.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        device: torch.device,
        units: list[Unit],
        inside: list[Unit],
        backward: BackwardPass,
        verdicts: Verdicts,
    ) -> None:
        self.name = name
        self.module = module
        self._args = args
        self._kwargs = kwargs
        self._saved_inputs: FrameInputs | None = None
        self._units = units
        self._inside = inside
        self._backward = backward
        self._versions = self._current_versions()
        self._verdicts = verdicts
        self._trial = None if verdicts.is_equal(module) else Trial(backward.pack, backward.place)
        self._is_open = True
        self._inputs = [(t, t._version) for t in tensors_in((args, kwargs)) if not t.is_inference()]
        self._ambient = Ambient(device)
        self._given = PythonState((*args, *kwargs.values()))
        self._own = PythonState((module,), verdicts.around(module))
        self._buffers = ModuleBuffers(module, verdicts.written_buffers)
        self._saved: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._values: list[object] | None = None
        self.opaque = self._given.opaque or self._own.opaque
        self.is_kept = self.is_trying = self.is_stopped = False
        self._is_given_up = False
        self.error: BaseException | None = None

    # -- forward -------------------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> _Saved:
        """Stands for ``tensor``, which autograd saves and the frame does not hold."""
        self._saved.append((tensor.shape, tensor.dtype, tensor.device))
        if self._trial is not None:
            self._trial.save(tensor)
        return _Saved(self, len(self._saved) - 1)

    def end_forward(self) -> None:
        """The forward is over: keep the old values of buffers that it changed, and decide whether it can be run again.

        Raises:
            RecomputeError: It changed an input in place, or wrote to its parameters, and its first forward did not.
        """
        self._is_open = False
        trial, self._trial = self._trial, None
        self._buffers.end_forward(is_first=trial is not None)
        if trial is None:
            self._require_same_inputs("its own forward changed a tensor in place, and did not in its first one")
            if self._has_written():
                self._refuse("its own forward wrote to its parameters, and did not in its first one")
        elif self._saved:
            reason = self._reason_to_keep(trial)
            if reason is None:
                self._verdicts.pass_(self.module)
            else:
                self._verdicts.keep(self.module, self.name, reason)
                self._keep_saved(trial.kept)

    def _reason_to_keep(self, trial: Trial) -> str | None:
        """Why the module cannot be run again; see [Note: trial]."""
        if not self._has_same_inputs:
            return "it changes a tensor in place that was there before"
        if self._has_written():
            return "it writes to its own parameters"
        self.is_trying = True
        try:
            self._run_again(trial.compare, self._backward.run_again)
        except SSDOffloadError:
            raise
        except Exception as error:
            return f"the second time it raised {type(error).__name__}: {error}"
        finally:
            self.is_trying = False
        self._require_same_inputs("its second run changed a tensor in place, and the first did not")
        return trial.difference()

    def _keep_saved(self, kept: list[object]) -> None:
        self.is_kept = True
        self._values = kept
        self._drop_inputs()

    def give_up(self) -> None:
        """The step is over, or has failed: drop what a second forward would need, if that keeps the frame alive itself.

        A forward that puts its result into an argument, such as a cache of keys and values, makes a circle through the
        graph, which holds the frame. Backward breaks it. Without backward nothing would: Python cannot see it.
        """
        if self._given.is_changed:
            self._is_given_up = True
            self._values = self._saved_inputs = None
            self._drop_inputs()

    def _drop_inputs(self) -> None:
        self._args, self._kwargs = (), {}
        self._inputs = []
        self._buffers.drop()
        self._given = self._own = PythonState(())

    def save_inputs(self, store: ActivationStore) -> None:
        """Have ``store`` save the large inputs, and drop them. Called after `end_forward` and hooks on `inputs`."""
        given: list[Tensor] = []

        def take(tensor: Tensor) -> object:
            if not store.can_save(tensor):
                return tensor
            if not any(tensor is other for other in given):
                given.append(tensor)
            index = next(i for i, other in enumerate(given) if tensor is other)
            return _Given(index, tensor.requires_grad)

        self._args = mapped(self._args, Tensor, take)
        self._kwargs = {key: mapped(value, Tensor, take) for key, value in self._kwargs.items()}
        self._given.map(take)
        self._inputs = [(t, v) for t, v in self._inputs if not any(t is other for other in given)]
        self._saved_inputs = store.save(self.name, given)

    @property
    def inputs(self) -> Iterator[Tensor]:
        """Tensors among the arguments; after `save_inputs`, only those that the store did not take."""
        return (t for t, _ in self._inputs)

    # -- backward ------------------------------------------------------------------------------------------------

    def unpack(self, saved: _Saved) -> Tensor:
        """The tensor that was packed as ``saved``; recomputes if it is not in memory."""
        return saved.frame.value(saved.index)

    def value(self, index: int) -> Tensor:
        """The ``index``-th saved tensor."""
        if self._is_open and self._trial is None:
            raise RecomputeError(self._inner_backward())
        if self._trial is not None:
            return self._backward.unpack(self._trial.kept[index])
        if self._is_given_up:
            self._refuse(
                "backward reaches its forward of an earlier step, which put results into its arguments; run it in "
                "the step of its forward"
            )
        if self._values is None:
            self._require_same_inputs("a later operation changed an input of it in place")
            self._values = self._recompute()
        value = self._values[index]
        return self._backward.unpack(value) if self.is_kept else self._backward.show(self, value)

    def drop(self) -> None:
        """Drop the recomputed tensors; if autograd unpacks again, they are recomputed again."""
        if self._values is not None and not self.is_kept:
            # The list must be emptied: a detached view holds its base, and so the second run's graph, whose hooks hold
            # the list. This cycle would keep the tensors, and the unit's buffer, until the process ends.
            self._values.clear()
            self._values = None

    def _recompute(self) -> list[object]:
        values: list[object] = []
        found: list[tuple[torch.Size, torch.dtype, torch.device]] = []

        def pack(tensor: Tensor) -> int:
            if not self.is_stopped:
                values.append(self._backward.hide(tensor, self._units))
                found.append((tensor.shape, tensor.dtype, tensor.device))
            self.is_stopped = len(values) == len(self._saved)
            if self.is_stopped:
                raise _AllSavedError
            return len(values) - 1

        try:
            self._run_again(pack, self._backward.rerun)
        except SSDOffloadError:
            raise
        except Exception as error:
            raise RecomputeError(
                f"unit {self.name!r}: its forward was run a second time, to recompute its activations in backward, and "
                f"raised {type(error).__name__}: {error}; if it cannot be run twice, {REMEDY}"
            ) from error
        self._require_same_saved(found)
        return values

    def _run_again(self, pack: Callable[[Tensor], int], rerun: Callable[[Frame, Callable[[], object]], None]) -> None:
        """The second run, with all state as it was in the first."""
        self.is_stopped = False
        self.error = None

        def unpack(index: int) -> Tensor:
            raise RecomputeError(self._inner_backward())

        def run() -> None:
            try:
                # Not a `__call__` that the class overrides: the frame was made inside it.
                nn.Module.__call__(self.module, *args, **kwargs)
            except Exception:  # the module may have replaced `_AllSavedError` by its own
                if not self.is_stopped:
                    raise
            error, self.error = self.error, None  # the graph holds us, and with us what the error refers to
            if error is not None:
                raise error

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._ambient.again())
            load = self._loader()
            stack.enter_context(self._own.restored())
            stack.enter_context(self._given.restored(load))
            stack.enter_context(self._buffers.restored())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
            args = mapped(self._args, _Given, load)
            kwargs = {key: mapped(value, _Given, load) for key, value in self._kwargs.items()}
            rerun(self, run)

    def _inner_backward(self) -> str:
        return f"unit {self.name!r}: backward inside its own forward cannot be recomputed; {REMEDY}"

    def _loader(self) -> Callable[[Any], Any]:
        """A function that returns the saved input that a `_Given` stands for, and any other value as it is."""
        values = [] if self._saved_inputs is None else self._saved_inputs.load()
        found: dict[int, Tensor] = {}  # one tensor stays one tensor

        def load(held: Any) -> Any:
            if not isinstance(held, _Given):
                return held
            if held.index not in found:
                tensor = values[held.index]
                # A view, so that it is no leaf: autocast caches casts of leaves.
                found[held.index] = tensor.requires_grad_().view_as(tensor) if held.requires_grad else tensor
            return found[held.index]

        return load

    @property
    def _has_same_inputs(self) -> bool:
        is_kept_same = self._saved_inputs is None or self._saved_inputs.is_unchanged
        is_state_same = not (self._given.is_written or self._own.is_written)
        return is_kept_same and is_state_same and all(t._version == version for t, version in self._inputs)

    def _has_written(self) -> bool:
        """Whether the forward wrote to parameters."""
        return self._versions != self._current_versions()

    def _current_versions(self) -> list[int]:
        return [param._version for unit in (*self._units, *self._inside) for param in unit.params]

    def _require_same_inputs(self, what: str) -> None:
        if not self._has_same_inputs:
            self._refuse(what)

    def _refuse(self, what: str) -> NoReturn:
        raise RecomputeError(f"unit {self.name!r} cannot be recomputed: {what}; {REMEDY}")

    def _require_same_saved(self, found: list[tuple[torch.Size, torch.dtype, torch.device]]) -> None:
        if found != self._saved:
            where = next((i for i, (a, b) in enumerate(zip(self._saved, found, strict=False)) if a != b), None)
            detail = (
                f"{len(self._saved)} tensors were saved, then {len(found)}"
                if where is None
                else f"tensor {where} was {self._saved[where][:2]}, then {found[where][:2]}"
            )
            raise RecomputeError(
                f"unit {self.name!r}: its forward does something else the second time ({detail}); does it depend on "
                f"state outside it, such as a cache? {REMEDY}"
            )


class _AllSavedError(getattr(torch.utils.checkpoint, "_StopRecomputationError", Exception)):  # type: ignore[misc]
    """Ends a second run early; not a failure.

    An `Exception`, since torch runs forward hooks after those only; of torch's own class, since some code that catches
    every exception in forward lets that one pass.
    """


@dataclass(frozen=True)
class _Given:
    """Stands for the ``index``-th input that the store saved."""

    index: int
    requires_grad: bool


class _Saved:
    """Stands for the ``index``-th tensor saved under ``frame``."""

    __slots__ = ("frame", "index")

    def __init__(self, frame: Frame, index: int) -> None:
        self.frame = frame
        self.index = index


def keeps_activations(module: nn.Module) -> bool:
    """Whether ``module`` must keep its activations: it works in place and may change its own inputs."""
    return any(getattr(m, "inplace", False) is True for m in module.modules())
