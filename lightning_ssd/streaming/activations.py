"""Recompute: a unit's forward keeps its inputs only; backward runs that forward again for the tensors it saved.

[Note: recompute] A forward under a `Frame` packs each tensor that autograd saves as a number. The first unpack in
backward calls the module again, with the same inputs, generator state, autocast state and buffers, through the same
hooks (so through the same fetch), and collects what autograd saves this time; the n-th of these is the n-th of the
first run. The second run's own graph is thrown away, so it may start from other tensors with the same values: large
inputs are in the activation store, [Note: kept inputs]. Once the second run of a module was compared with the first to
its end, later ones end with the last saved tensor, by an exception: what would come after it, such as the product of a
block's last matrix, nobody needs (torch.utils.checkpoint stops early too, from the first time on).

Method: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lightning_ssd.streaming.activation_store import ActivationStore, Kept

_REMEDY = "set activations='keep' in the strategy to keep its activations instead"


class Frame:
    """One forward of one module that will be run again in backward.

    Args:
        name: The unit's name, for messages.
        module: What to call again.
        args: Its arguments.
        kwargs: Those by name.
        device: Where it computes.
        rerun: Runs it again.
        compared: Modules whose second run may end early, as it was compared with the first to its end; added to.

    Attributes:
        name: The unit's name, for messages.
        module: What to call again.
        is_stopped: The second run is ending early, since all is saved.
        error: What one of our hooks raised then; torch only warns of it.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        *,
        device: torch.device,
        rerun: Rerun,
        compared: set[nn.Module],
    ) -> None:
        self.name = name
        self.module = module
        self._args = args
        self._kwargs = kwargs
        self._kept: Kept | None = None
        self._device = device
        self._rerun = rerun
        self._compared = compared
        self._is_open = True
        self._inputs = [(t, t._version) for t in tensors_in((args, kwargs)) if not t.is_inference()]
        self._generators = _generator_states(device)
        self._autocast = _autocast_states(device)
        self._buffers = [(m, n, b, b.clone()) for m, n, b in _buffers(module)]
        self._saved: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._values: list[Tensor] | None = None
        self.is_stopped = False
        self.error: BaseException | None = None

    # -- forward -------------------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> _Saved:
        """Forget a tensor that autograd saves; remember its place."""
        self._saved.append((tensor.shape, tensor.dtype, tensor.device))
        return _Saved(self, len(self._saved) - 1)

    def end_forward(self) -> None:
        """The forward is over: keep old values of the buffers it changed, and check that its inputs are as they were.

        Raises:
            RuntimeError: If it changed an input in place.
        """
        self._is_open = False
        self._buffers = [item for item in self._buffers if not torch.equal(item[2], item[3])]
        self._require_same_inputs("its own forward changed an input in place")

    def keep(self, store: ActivationStore) -> None:
        """Let go of large inputs; ``store`` keeps their values. Follows `end_forward`, and hooks on `inputs`."""
        given: list[Tensor] = []

        def take(tensor: Tensor) -> object:
            if not store.can_keep(tensor):
                return tensor
            if not any(tensor is other for other in given):
                given.append(tensor)
            index = next(i for i, other in enumerate(given) if tensor is other)
            return _Given(index, tensor.requires_grad)

        self._args, self._kwargs = _mapped((self._args, self._kwargs), Tensor, take)
        self._inputs = [(t, v) for t, v in self._inputs if not any(t is other for other in given)]
        self._kept = store.keep(self.name, given)

    @property
    def inputs(self) -> Iterator[Tensor]:
        """Tensors among the arguments; after `keep` only those that stayed."""
        return (t for t, _ in self._inputs)

    # -- backward ------------------------------------------------------------------------------------------------

    def unpack(self, saved: _Saved) -> Tensor:
        """The tensor that was packed, recomputed now if it is not in memory."""
        return saved.frame.value(saved.index)

    def value(self, index: int) -> Tensor:
        """The ``index``-th saved tensor."""
        if self._values is None:
            if self._is_open:
                raise RuntimeError(self._inner_backward())
            self._require_same_inputs("a later operation changed an input of it in place")
            self._values = self._recompute()
        return self._values[index]

    def drop(self) -> None:
        """Forget the recomputed tensors; if autograd asks again, they are computed again."""
        if self._values is not None:
            # Emptied, not only let go: a detached view holds its base, so the second run's graph, whose hooks hold the
            # list. Without this the tensors, and the unit's buffer under them, live until the process ends.
            self._values.clear()
        self._values = None

    def _recompute(self) -> list[Tensor]:
        values: list[Tensor] = []
        self.is_stopped = False
        self.error = None
        may_stop = self.module in self._compared

        def pack(tensor: Tensor) -> int:
            if not self.is_stopped:
                values.append(tensor.detach())
            self.is_stopped = may_stop and len(values) == len(self._saved)
            if self.is_stopped:
                raise _AllSavedError
            return len(values) - 1

        def unpack(index: int) -> Tensor:
            raise RuntimeError(self._inner_backward())

        def run() -> None:
            try:
                self.module(*args, **kwargs)
            except Exception:  # the module may have made another one of ours
                if not self.is_stopped:
                    raise
            error, self.error = self.error, None  # the graph holds us, and would hold all that the error refers to
            if error is not None:
                raise error

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_generators_at(self._generators, self._device))
            for device_type, (enabled, dtype, cache) in self._autocast.items():
                stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache))
            stack.enter_context(self._old_buffers())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
            args, kwargs = self._loaded()
            self._rerun(self, run)
        self._require_same_saved(values)
        self._compared.add(self.module)
        return values

    def _inner_backward(self) -> str:
        return f"unit {self.name!r}: backward inside its own forward cannot be recomputed; {_REMEDY}"

    def _loaded(self) -> tuple[Any, Any]:
        """The arguments, with what the store keeps put back."""
        if self._kept is None:
            return self._args, self._kwargs
        values = self._kept.load()
        found: dict[int, Tensor] = {}  # the same tensor where it was the same

        def put_back(given: _Given) -> Tensor:
            if given.index not in found:
                tensor = values[given.index]
                # Autocast caches casts of leaves: what was none must not become one.
                found[given.index] = tensor.requires_grad_().view_as(tensor) if given.requires_grad else tensor
            return found[given.index]

        args, kwargs = _mapped((self._args, self._kwargs), _Given, put_back)
        return args, kwargs

    @contextmanager
    def _old_buffers(self) -> Iterator[None]:
        # Copies, so that the second run cannot change what the first has already changed.
        old = {(m, n): value for m, n, _, value in self._buffers}
        live = list(_buffers(self.module))
        for m, n, b in live:
            m._buffers[n] = old.get((m, n), b).clone()
        try:
            yield
        finally:
            for m, n, b in live:
                m._buffers[n] = b

    def _require_same_inputs(self, what: str) -> None:
        is_same = self._kept is None or self._kept.is_unchanged
        if not is_same or any(t._version != version for t, version in self._inputs):
            raise RuntimeError(f"unit {self.name!r} cannot be recomputed: {what}; {_REMEDY}")

    def _require_same_saved(self, values: list[Tensor]) -> None:
        found = [(t.shape, t.dtype, t.device) for t in values]
        if found != self._saved:
            where = next((i for i, (a, b) in enumerate(zip(self._saved, found, strict=False)) if a != b), None)
            detail = (
                f"{len(self._saved)} tensors were saved, then {len(found)}"
                if where is None
                else f"tensor {where} was {self._saved[where][:2]}, then {found[where][:2]}"
            )
            raise RuntimeError(
                f"unit {self.name!r}: its forward does something else the second time ({detail}); does it depend on "
                f"state outside it, such as a cache? {_REMEDY}"
            )


class _AllSavedError(getattr(torch.utils.checkpoint, "_StopRecomputationError", Exception)):  # type: ignore[misc]
    """Ends a second run. Not a failure; an `Exception`, since torch runs forward hooks after these only.

    Code that catches everything in forward lets torch's pass, where it knows of it.
    """


@dataclass(frozen=True)
class _Given:
    """Stands for an input that is the ``index``-th in the store."""

    index: int
    requires_grad: bool


class _Saved:
    """Stands for the ``index``-th tensor saved under ``frame``."""

    __slots__ = ("frame", "index")

    def __init__(self, frame: Frame, index: int) -> None:
        self.frame = frame
        self.index = index


Rerun = Callable[[Frame, Callable[[], object]], None]
"""Runs a frame's module again; holds its units until the frame's backward is over."""


def without_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments without key-value caches of generation: a forward that adds to one cannot be run twice."""

    def is_cache(value: Any) -> bool:
        return hasattr(value, "get_seq_length") and hasattr(value, "update")

    if not any(map(is_cache, (*args, *kwargs.values()))):
        return args, kwargs
    kept = {k: None if is_cache(v) else v for k, v in kwargs.items()}
    if "use_cache" in kept:
        kept["use_cache"] = False
    return tuple(None if is_cache(v) else v for v in args), kept


def keeps_activations(module: nn.Module) -> bool:
    """Whether ``module`` must keep its activations: it works in place and may change its own inputs."""
    return any(getattr(m, "inplace", False) is True for m in module.modules())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors inside nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def _mapped(value: Any, kind: type[Any], change: Callable[[Any], Any]) -> Any:
    """``value`` with everything of ``kind`` inside plain tuples, lists and dicts changed; those are copied."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, kind, change) for item in value)
    if type(value) is dict:
        return {key: _mapped(item, kind, change) for key, item in value.items()}
    return value


def _buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for m in module.modules():
        for name, buffer in m._buffers.items():
            if buffer is not None:
                yield m, name, buffer


@dataclass(frozen=True)
class _Generators:
    """States of every generator that a forward may draw from."""

    python: Any
    numpy: Any
    torch_cpu: Tensor
    torch_cuda: Tensor | None


def _generator_states(device: torch.device) -> _Generators:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return _Generators(random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpu)


def _set_generator_states(states: _Generators, device: torch.device) -> None:
    random.setstate(states.python)
    np.random.set_state(states.numpy)
    torch.set_rng_state(states.torch_cpu)
    if states.torch_cuda is not None:
        torch.cuda.set_rng_state(states.torch_cuda, device)


@contextmanager
def _generators_at(states: _Generators, device: torch.device) -> Iterator[None]:
    before = _generator_states(device)
    _set_generator_states(states, device)
    try:
        yield
    finally:
        _set_generator_states(before, device)


def _autocast_states(device: torch.device) -> dict[str, tuple[bool, torch.dtype, bool]]:
    return {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
        for kind in {device.type, "cpu"}
    }
