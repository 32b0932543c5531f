"""The user's optimizer, adopted: it stays the same object and the only source of hyper-parameters; its step streams.

On the instance (never on the class) ``step``, ``zero_grad``, ``state_dict`` and ``load_state_dict`` are replaced;
`StreamedOptimizer.release` undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_ssd.errors import CheckpointError, ConfigurationError, StoreError
from lightning_ssd.optim.pipeline import ParameterUpdate, Pipeline, master_dtype, require_finite
from lightning_ssd.optim.queue import Owed, UpdateQueue
from lightning_ssd.optim.rules import Rule, TorchRule, is_full
from lightning_ssd.optim.shared import SharedOptions
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.streaming.at_rest import snapshot
from lightning_ssd.streaming.gradients import params_with_grad
from lightning_ssd.streaming.residency import Residents
from lightning_ssd.streaming.unit import Unit


class StreamedOptimizer:
    """Runs the step of one optimizer over streamed units.

    Args:
        optimizer: The user's.
        rule: What an update does.
        units: All units, in forward order.
        store: Where states are.
        keep_master: Keep a float32 master of 16-bit parameters.

    Raises:
        ConfigurationError: If the optimizer has a parameter that is not the model's.
    """

    def __init__(
        self, optimizer: Optimizer, rule: Rule, units: list[Unit], store: StateStore, *, keep_master: bool
    ) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self._store = store
        self._keep_master = keep_master
        self._places = {param: (unit, i) for unit in units for i, param in enumerate(unit.params)}
        self._scalars: dict[nn.Parameter, dict[str, Any]] = {}
        self._initialised: dict[nn.Parameter, set[str]] = {}
        self._options = SharedOptions(optimizer)
        self._pipeline: Pipeline | None = None
        self._residents: Residents | None = None
        self._queue: UpdateQueue | None = None
        self._is_half_made = False  # when the run ended
        for i, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if param not in self._places:
                    raise ConfigurationError(
                        f"optimizer {type(optimizer).__name__} has, in group {i}, a parameter of shape "
                        f"{tuple(param.shape)} that is not a parameter of the LightningModule; register it there"
                    )

    # -- life ----------------------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Take over the optimizer's step, and the state it has from an earlier run or from the user."""
        earlier = self.optimizer.state_dict()
        step = self._make_step()
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        self.optimizer.step = step  # type: ignore[method-assign]
        self.optimizer.zero_grad = self._make_zero_grad()  # type: ignore[method-assign]
        self.optimizer.state_dict = self.state_dict  # type: ignore[method-assign]
        self.optimizer.load_state_dict = self.load_state_dict  # type: ignore[method-assign]
        if earlier["state"]:
            self.load_state_dict(earlier)
            self.optimizer.state.clear()

    def connect(self, pipeline: Pipeline, residents: Residents, queue: UpdateQueue) -> None:
        """From now on steps can run."""
        self._pipeline = pipeline
        self._residents = residents
        self._queue = queue

    def release(self) -> None:
        """Give the optimizer its own step back; ``state_dict`` goes on to show what is in the store."""
        self._is_half_made = self.is_mid_step
        self._pipeline = self._residents = self._queue = None
        for name in ("step", "zero_grad"):
            self.optimizer.__dict__.pop(name, None)

    def drain(self) -> None:
        """Return when every update that is owed has run."""
        if self._queue is not None:
            self._queue.drain()

    # -- step ----------------------------------------------------------------------------------------------------

    def update(
        self,
        unit: Unit,
        grads: Mapping[int, Tensor],
        *,
        is_last: bool = False,
        land: Callable[[], None] | None = None,
    ) -> None:
        """Owe the update of the parameters of ``unit`` that this optimizer owns and that have a gradient.

        Args:
            unit: What to update.
            grads: Complete gradients by parameter index; they must not change before the update has run.
            is_last: The gradients are held by nobody else, and count against the queue's memory.
            land: Returns when the gradients are there; None if they are. The thread that updates calls it.

        Raises:
            NonFiniteGradientError: A gradient holds NaN or Inf; nothing of the unit has changed. Of gradients that are
                still to land, it is raised by who next waits for an update.
        """
        pipeline, residents, queue = self._pipeline, self._residents, self._queue
        assert pipeline is not None
        assert residents is not None
        assert queue is not None
        queue.wait(unit)  # of another optimizer, or of the step before
        groups = self._groups()
        mine = {index: grad for index, grad in grads.items() if unit.params[index] in groups}
        if not mine:
            return
        if land is None:
            require_finite(unit, mine)
        parts = self._parts(unit, mine, groups)
        residents.settle(unit)
        residents.before_update(unit)
        # Where there is a master, the values in memory are not what the rule updates.
        reads = pipeline.updates_values_of(unit)
        is_borrowed = reads and residents.borrow(unit)

        def end_borrow() -> None:
            if is_borrowed:
                residents.end_borrow(unit)

        def run() -> None:
            try:
                if land is not None:
                    land()
                    require_finite(unit, mine)
                    for part in parts.values():
                        part.version = part.grad._version  # what landed may have been added to it
                residents.end_copy(unit)
                loan = residents.lend(unit, reads=reads)
            finally:
                end_borrow()
            pipeline.update(unit, self.rule, parts, loan, done=complete)

        def complete() -> None:
            queue.complete(unit)
            residents.updated(unit)

        nbytes = sum(part.grad.nbytes for part in parts.values()) if is_last else 0
        position = residents.schedule.position(unit.name, "train")
        is_kept = unit.kept is not None
        queue.add(Owed(unit, nbytes, position, is_kept, lambda: residents.is_free(unit), run, end_borrow))

    def _parts(
        self, unit: Unit, grads: Mapping[int, Tensor], groups: Mapping[nn.Parameter, int]
    ) -> dict[int, ParameterUpdate]:
        parts: dict[int, ParameterUpdate] = {}
        by_class = isinstance(self.rule, TorchRule)  # which may change what it is given
        for index, grad in grads.items():
            param = unit.params[index]
            group = groups[param]
            options = self._options.hand_out(group) if by_class else self._options.before(group)
            scalars = self._scalars.setdefault(param, {})
            initialised = self._initialised.setdefault(param, set())
            parts[index] = ParameterUpdate(grad, grad._version, options, scalars, initialised)
        return parts

    @property
    def is_mid_step(self) -> bool:
        """Whether a step has updated some units and can or could not update all: it runs now, or it failed."""
        return self._is_half_made or self._options.is_used or (self._queue is not None and self._queue.is_broken)

    def _make_step(self) -> Callable[..., Any]:
        optimizer = self.optimizer

        def step(closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
            hooks = chain(_global_optimizer_pre_hooks.values(), optimizer._optimizer_step_pre_hooks.values())
            for hook in hooks:
                hook(optimizer, (closure, *args), kwargs)
            self._clear_step()  # of one that failed, if the user went on after it
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._finish_step()
            after = chain(optimizer._optimizer_step_post_hooks.values(), _global_optimizer_post_hooks.values())
            for hook in after:
                hook(optimizer, (closure, *args), kwargs)
            optimizer._opt_called = True  # type: ignore[attr-defined]
            return loss

        return step

    def _make_zero_grad(self) -> Callable[..., None]:
        zero_grad = self.optimizer.zero_grad

        def zero(set_to_none: bool = True) -> None:
            if not set_to_none:
                self.drain()  # an update that is owed reads what this overwrites
            zero_grad(set_to_none)

        return zero

    def _finish_step(self) -> None:
        assert self._residents is not None
        self._residents.end_step()  # whoever reads a parameter from now on gets its new value
        for unit, grads in params_with_grad(self._units()):
            self.update(unit, grads)
        if isinstance(self.rule, TorchRule):
            self.drain()
            for group in self._options.unused_groups():
                self.rule.idle(self._options.hand_out(group))
            self.rule.finish()
        self._options.finish()

    def _clear_step(self) -> None:
        self._options.clear()
        if isinstance(self.rule, TorchRule):
            self.rule.clear()

    def _params(self) -> Iterable[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _units(self) -> Iterable[Unit]:
        return {self._places[p][0].name: self._places[p][0] for p in self._params()}.values()

    def _groups(self) -> dict[nn.Parameter, int]:
        return {p: i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}

    # -- state ---------------------------------------------------------------------------------------------------

    def scalars(self) -> dict[str, dict[str, Any]]:
        """What is kept beside full-shaped states, by parameter name."""
        self.drain()
        return {self._name(p): dict(s) for p, s in self._scalars.items() if s}

    def initialised(self) -> dict[str, set[str]]:
        """Kinds of full-shaped states that each parameter has, by parameter name."""
        self.drain()
        return {self._name(p): set(kinds) for p, kinds in self._initialised.items() if kinds}

    def groups_by_name(self) -> list[dict[str, Any]]:
        """Parameter groups with names in place of parameters."""
        return [{**group, "params": [self._name(p) for p in group["params"]]} for group in self.optimizer.param_groups]

    def shapes_by_name(self) -> list[dict[str, tuple[int, ...]]]:
        """Name and shape of the parameters, group by group."""
        return [{self._name(p): tuple(p.shape) for p in group["params"]} for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with state tensors mapped from the store."""
        self.drain()
        state: dict[int, dict[str, Any]] = {}
        maps: dict[tuple[str, str], tuple[Tensor, ...]] = {}
        for number, param in enumerate(self._params()):
            found = dict(self._scalars.get(param, {}))
            unit, index = self._places[param]
            for kind in sorted(self._initialised.get(param, ())):
                key = (unit.name, kind)
                if key not in maps:
                    maps[key] = self._snapshot(*key)
                found[kind] = maps[key][index]
            if found:
                state[number] = found
        groups = []
        numbers = iter(range(sum(1 for _ in self._params())))
        for group in self.optimizer.param_groups:
            groups.append({**group, "params": [next(numbers) for _ in group["params"]]})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; tensors are streamed into the store unit by unit.

        Raises:
            CheckpointError: If the state does not fit the optimizer.
        """
        self.drain()
        saved_groups = state_dict["param_groups"]
        groups = self.optimizer.param_groups
        sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, saved_groups))
        if sizes != saved_sizes:
            raise CheckpointError(
                f"the optimizer state is for groups of {saved_sizes} parameters, {type(self.optimizer).__name__} has "
                f"groups of {sizes}; configure_optimizers must be as it was when the checkpoint was saved"
            )
        loaded: dict[nn.Parameter, dict[str, Any]] = {}
        for group, saved in zip(groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
            for param, number in zip(group["params"], saved["params"], strict=True):
                if number in state_dict["state"]:
                    loaded[param] = state_dict["state"][number]
        self._take(loaded)

    def _take(self, loaded: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        self._initialised.clear()
        self._scalars.clear()
        kinds_of = [self.rule.kinds(group) for group in self.optimizer.param_groups]
        groups = self._groups()
        for param, values in loaded.items():
            self._require_shapes(param, values, kinds_of[groups[param]])
            full = {k for k, v in values.items() if is_full(k, v, param.shape, kinds_of[groups[param]])}
            self._initialised[param] = full
            self._scalars[param] = {k: v for k, v in values.items() if k not in full}
        for unit in list(self._units()):
            kinds = {kind for p in unit.params for kind in self._initialised.get(p, ())}
            kinds.update(kind for kind in self._store.kinds(unit.name) if kind not in ("param", "master"))
            for kind in sorted(kinds):
                self._take_kind(unit, kind, loaded)

    def _require_shapes(self, param: nn.Parameter, values: Mapping[str, Any], kinds: Iterable[str]) -> None:
        """A moment of another shape than its parameter's belongs to another one; a class of its own may keep any."""
        for kind in kinds if self.rule.is_elementwise else ():
            value = values.get(kind)
            if isinstance(value, Tensor) and value.shape != param.shape:
                raise CheckpointError(
                    f"state {kind!r} of {self._name(param)!r} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(param.shape)}; the optimizer's parameters are in another order than when it was saved"
                )

    def _take_kind(self, unit: Unit, kind: str, loaded: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        layout = unit.layout_of(kind, master_dtype(unit, keep_master=self._keep_master))
        wanted = dtype_of(layout.dtype)
        mine = set(self._params())
        # Another optimizer may own some of the unit's parameters: their state stays.
        before = self._snapshot(unit.name, kind) if kind in self._store.kinds(unit.name) else (None,) * len(unit.params)
        tensors: list[Tensor | None] = []
        for name, param, old in zip(unit.names, unit.params, before, strict=True):
            tensor = loaded.get(param, {}).get(kind) if param in mine else old
            if tensor is not None and tensor.dtype != wanted and tensor.dtype.itemsize > wanted.itemsize:
                raise CheckpointError(f"state {kind!r} of {name!r} is {tensor.dtype}, the run keeps {wanted}")
            tensors.append(tensor)
        self._store.put(layout, tensors.__getitem__)

    def _snapshot(self, unit: str, kind: str) -> tuple[Tensor, ...]:
        generation = self._store.current(unit, kind)
        if generation is None:
            raise StoreError(
                f"the state of {type(self.optimizer).__name__} is gone: its run is over and another one has begun"
            )
        return snapshot(self._store, generation)

    def _name(self, param: nn.Parameter) -> str:
        unit, index = self._places[param]
        return unit.names[index]
