"""Whether code may read gradients between backward and the update: then they must be visible as ``.grad``."""

from __future__ import annotations

from typing import Any

_MODULE_HOOKS = (
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "backward",
    "on_before_zero_grad",
    "optimizer_zero_grad",  # zeros instead of None are gradients of the next step
)
_CALLBACK_HOOKS = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
_STOCK = ("lightning.pytorch.core.", "pytorch_lightning.core.", "lightning.pytorch.callbacks.callback")
_STOCK_CALLBACK = "pytorch_lightning.callbacks.callback"


def find_grad_consumer(trainer: Any, module: Any) -> str | None:
    """The first setting or hook that may read gradients; None if there is none."""
    if trainer.gradient_clip_val:
        return "gradient_clip_val"
    for name in _MODULE_HOOKS:
        if _is_overridden(module, name):
            return f"{type(module).__name__}.{name}"
    for callback in trainer.callbacks:
        if any(cls.__name__ == "StochasticWeightAveraging" for cls in type(callback).__mro__):
            # Its last pass, which renews statistics of batch norm, makes a step on the gradients of the step before.
            return type(callback).__name__
        for name in _CALLBACK_HOOKS:
            if _is_overridden(callback, name):
                return f"{type(callback).__name__}.{name}"
    return None


def _is_overridden(obj: Any, name: str) -> bool:
    if name in vars(obj):
        return True
    owner = next((cls for cls in type(obj).__mro__ if name in vars(cls)), None)
    return owner is not None and not owner.__module__.startswith((*_STOCK, _STOCK_CALLBACK))
