"""An optimizer that cannot be run on one parameter at a time: its own step runs on all its parameters, in memory.

The plan holds its parameters in memory, its state is its own, and gradients wait for the step. In the step the
parameters view that memory, so what the optimizer writes is their value; a closure that it calls runs like a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.optim.rules import Rule
from lightning_ssd.units.param_cache import ParamCache


class WholeRule(Rule):
    """Marks such an optimizer: it has no kinds that stream, and no part of it can be updated by itself.

    Attributes:
        why: Why it is run whole, for messages.
        state_ratio: Bytes of its state for each byte of its parameters.
    """

    is_elementwise = True

    def __init__(self, why: str, state_ratio: float) -> None:
        self.why = why
        self.state_ratio = state_ratio


class WholeOptimizer(OptimizerAdapter):
    """Runs the step of such an optimizer."""

    _is_stepping = False
    _replaced: Mapping[str, Any] = MappingProxyType({})  # what the user had put in the place of the class's step

    def adopt(self) -> None:
        """Take over the optimizer's step; all else stays as it is."""
        own = self.optimizer.step
        step = partial(self._step, own)
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        self._methods = {"step": step}
        self._replaced = {name: value for name, value in vars(self.optimizer).items() if name == "step"}
        self.optimizer.step = step  # type: ignore[method-assign]

    def release(self) -> None:
        """Give the optimizer its own step back."""
        self._is_half_made = self.is_mid_step
        self._updates = None
        if self.makes_steps:
            del self.optimizer.__dict__["step"]
            vars(self.optimizer).update(self._replaced)

    def dismiss(self, others: Iterable[OptimizerAdapter]) -> None:
        """Another optimizer replaces it; its state is its own already."""
        self.release()

    @property
    def is_mid_step(self) -> bool:
        """Whether a step failed after it may have changed parameters."""
        return self._is_half_made or self._is_stepping

    def scalars(self) -> dict[str, dict[str, Any]]:
        """Nothing: see `optimizer_state`."""
        return {}

    def initialised(self) -> dict[str, set[str]]:
        """Nothing: see `optimizer_state`."""
        return {}

    def _step(self, own: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        is_named = "closure" in kw
        closure = kw.pop("closure") if is_named else (args[0] if args else None)
        self._is_stepping = False
        cache = self._require_updates().cache
        cache.end_step()
        with cache.step.suspended():  # parameters are offloaded, whatever runs around it
            if closure is None:
                self._require_written()
                self._is_stepping = True
                loss = own(*args, **kw, closure=None) if is_named else own(*args, **kw)
            else:
                evaluate = partial(self._evaluate, closure, cache)  # given as the user gave it
                loss = own(*args, **kw, closure=evaluate) if is_named else own(evaluate, *args[1:], **kw)
        self._is_stepping = False
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return loss

    def _evaluate(self, closure: Callable[[], Any], cache: ParamCache) -> Any:
        with cache.step.suspended(False):
            try:
                loss = closure()
            finally:
                cache.end_step()
        self._require_written()
        self._is_stepping = True  # from here on it may write
        self.drain()  # updates of other optimizers
        return loss

    def _require_written(self) -> None:
        for unit, grads in self._units_with_grad():
            if unit.spilled_grads is not None:
                unit.spilled_grads.check(grads, is_final=False)
