"""The user's optimizer, adopted: it stays the same object and the source of hyper-parameters, and its step streams.

On the instance (never on the class) ``step``, ``zero_grad``, ``add_param_group``, ``state_dict``,
``load_state_dict`` and ``state`` are replaced; `OptimizerAdapter.release` and `OptimizerAdapter.dismiss` undo it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_ssd.errors import ConfigurationError, ResidencyError
from lightning_ssd.optim.rules import Rule, TorchRule
from lightning_ssd.optim.shared import SharedOptions
from lightning_ssd.optim.state_io import OptimizerState
from lightning_ssd.optim.update import ParameterUpdate, PendingUpdate, Updates, require_finite
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.inherited import Refused
from lightning_ssd.units.unit import Unit, Waitable


class OptimizerAdapter(OptimizerState):
    """Runs the step of one optimizer over streamed units.

    Args:
        optimizer: The user's.
        rule: What an update does.
        units: All units, in forward order.
        store: Where states are.
        suffix: Of the kinds that its states have in the store; [Note: suffix].

    Raises:
        ConfigurationError: If the optimizer has a parameter that is not the model's.
    """

    def __init__(self, optimizer: Optimizer, rule: Rule, units: list[Unit], store: StateStore, *, suffix: str) -> None:
        super().__init__(optimizer, rule, units, store, suffix=suffix)
        self._options = SharedOptions(optimizer)
        self._updates: Updates | None = None  # while steps can be made
        self._is_half_made = False  # the run ended within a step
        self._has_used_grads = False  # updates consumed gradients that plain torch would still have
        self._methods = {
            "step": self._make_step(),
            "zero_grad": self._make_zero_grad(),
            "add_param_group": self._make_add_param_group(),
        }
        for group in optimizer.param_groups:
            self._require_known(group["params"])

    # -- life ----------------------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Take over the optimizer's step, and the state it has from an earlier run or from the user."""
        earlier = self.optimizer.state_dict()
        vars(self.optimizer).update(self._methods)
        self.optimizer.state_dict = self.state_dict  # type: ignore[method-assign]
        self.optimizer.load_state_dict = self.load_state_dict  # type: ignore[method-assign]
        self.optimizer.state = self._view  # type: ignore[assignment]
        if earlier["state"]:
            self.load_state_dict(earlier)

    @property
    def makes_steps(self) -> bool:
        """Whether ``step`` of the optimizer is ours; the user may have put another one in its place."""
        return vars(self.optimizer).get("step") is self._methods["step"]

    def connect(self, updates: Updates) -> None:
        """From now on steps can be made, with ``updates``."""
        self._updates = updates

    def release(self) -> None:
        """Give the optimizer its own step back; ``state_dict`` still shows what is in the store."""
        self._is_half_made = self.is_mid_step
        self._updates = None
        for name, mine in self._methods.items():  # another run may have adopted it since
            if vars(self.optimizer).get(name) is mine:
                del self.optimizer.__dict__[name]

    def inherit(self) -> None:
        """This is a forked process: nothing can be updated, and states cannot be read."""
        name = type(self.optimizer).__name__
        refused: Any = Refused(f"optimizer {name} cannot make steps, nor show or load its state,")
        self._updates = refused
        self._store = refused
        self._has_used_grads = False  # a step is refused because of the fork, not because of them
        self._view.inherit(refused)

    def dismiss(self, others: Iterable[OptimizerAdapter]) -> None:
        """Another optimizer replaces it: give it its own methods back, and its state as mapped tensors."""
        self.drain()
        self._take_edits()
        state: dict[Tensor, Any] = {param: dict(self._view[param]) for param in self.params_with_state()}
        self._view.clear_shown()
        self.release()
        for name in ("state_dict", "load_state_dict"):
            self.optimizer.__dict__.pop(name, None)
        self.optimizer.state = defaultdict(dict, state)
        shared = {unit.name for other in others if other.suffix == self.suffix for unit in other._units()}
        self._forget([unit for unit in self._units() if unit.name not in shared])

    def _make_add_param_group(self) -> Callable[[dict[str, Any]], None]:
        add = self.optimizer.add_param_group

        def add_known(group: dict[str, Any]) -> None:
            params = group["params"]
            group = {**group, "params": [params] if isinstance(params, Tensor) else list(params)}
            self._require_known(group["params"])
            add(group)

        return add_known

    def drain(self) -> None:
        """Return when no update is pending."""
        if self._updates is not None:
            self._updates.updater.drain()

    # -- step ----------------------------------------------------------------------------------------------------

    def update(
        self,
        unit: Unit,
        grads: Mapping[int, Tensor],
        *,
        is_last: bool = False,
        in_flight: Waitable | None = None,
    ) -> None:
        """Submit the update of those parameters of ``unit`` that this optimizer owns and that have a gradient.

        Args:
            unit: What to update.
            grads: Complete gradients by parameter index; they must not change before the update has run.
            is_last: Nothing else holds the gradients: their memory counts against the budget.
            in_flight: Copies of gradients to the host, for which the thread that updates waits; None if all are there.

        Raises:
            NonFiniteGradientError: A gradient holds NaN or Inf; nothing of the unit has changed. For gradients that are
                still on their way, the next wait for an update raises the error.
        """
        updates = self._require_updates()
        groups = self._groups()
        mine = {index: grad for index, grad in grads.items() if unit.params[index] in groups}
        if not mine:
            return
        if unit.spilled_grads is not None:
            unit.spilled_grads.check(mine, is_final=False)
        if in_flight is None:
            require_finite(unit, mine)
        parts = {i: self._part(unit.params[i], grad, groups[unit.params[i]]) for i, grad in mine.items()}
        suffix = self.suffix
        update = PendingUpdate(updates, unit, self.rule, parts, suffix=suffix, is_last=is_last, in_flight=in_flight)
        self._has_used_grads |= is_last
        updates.updater.submit(update)

    def _part(self, param: nn.Parameter, grad: Tensor, group: int) -> ParameterUpdate:
        by_class = isinstance(self.rule, TorchRule)  # the class may write to its options
        options = self._options.hand_out(group) if by_class else self._options.before(group)
        scalars = self._scalars.setdefault(param, {})
        return ParameterUpdate(grad, grad._version, options, scalars, self._initialised.setdefault(param, set()))

    @property
    def is_mid_step(self) -> bool:
        """Whether some units are updated and others are not: a step runs now, or one failed."""
        updates = self._updates
        is_broken = updates is not None and updates.updater.is_broken
        return self._is_half_made or self._options.is_used or is_broken

    def _require_updates(self) -> Updates:
        """What steps are made with.

        Raises:
            ResidencyError: None can be made now.
        """
        if self._updates is None:
            raise ResidencyError(
                f"{type(self.optimizer).__name__}.step() was called before the fit began; call it in a training step, "
                "or let the Trainer call it"
            )
        return self._updates

    def _make_step(self) -> Callable[..., Any]:
        optimizer = self.optimizer

        def step(closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
            hooks = chain(_global_optimizer_pre_hooks.values(), optimizer._optimizer_step_pre_hooks.values())
            for hook in hooks:
                hook(optimizer, (closure, *args), kwargs)
            self._options.clear()  # the step before may have failed
            if isinstance(self.rule, TorchRule):
                self.rule.clear()
            self._take_edits()
            loss, were_used = None, self._has_used_grads
            if closure is not None and self.rule.calls_closure:
                with torch.enable_grad():
                    loss = closure()
                self._take_edits()
            if were_used:
                self._require_new_grads()
            self._finish_step()
            after = chain(optimizer._optimizer_step_post_hooks.values(), _global_optimizer_post_hooks.values())
            for hook in after:
                hook(optimizer, (closure, *args), kwargs)
            optimizer._opt_called = True  # type: ignore[attr-defined]
            return loss

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        return step

    def _make_zero_grad(self) -> Callable[..., None]:
        zero_grad = self.optimizer.zero_grad

        def zero(set_to_none: bool = True) -> None:
            self._has_used_grads = False
            if not set_to_none:
                self.drain()  # a pending update reads what this overwrites
            zero_grad(set_to_none)

        return zero

    def _require_new_grads(self) -> None:
        """Refuse a step on the gradients of the step before, which are gone.

        Raises:
            ConfigurationError: It would change nothing, where plain torch changes every parameter again.
        """
        is_new = self._options.is_used or not self._has_used_grads
        if not is_new and not any(True for _ in self._units_with_grad()):
            raise ConfigurationError(
                f"{type(self.optimizer).__name__}.step() was called again on the gradients of the step before, which "
                "went into that step's update as they came and are gone; keep them with overlap='off', or override "
                "on_before_optimizer_step of the LightningModule (an empty one will do)"
            )

    def _finish_step(self) -> None:
        self._require_known(self.params())  # a group's list may have been changed without `add_param_group`
        self._require_updates().cache.end_step()  # from now on an access to a parameter waits for its new value
        for unit, grads in self._units_with_grad():
            self.update(unit, grads)
        if isinstance(self.rule, TorchRule):
            self.drain()
            for group in self._options.unused_groups():
                self.rule.idle(self._options.hand_out(group))
            self.rule.finish()
        self._options.finish()


def use_adopted_methods(wrapper: Any) -> None:
    """Have Lightning's ``wrapper`` of an optimizer call that one's own methods, which may be ours.

    Its class is derived from the optimizer's class, and so it calls the methods of that class otherwise.
    """
    for name in ("zero_grad", "add_param_group"):
        setattr(wrapper, name, partial(_call, wrapper.optimizer, name))


def _call(optimizer: Optimizer, name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(optimizer, name)(*args, **kwargs)
