"""Whether code may read gradients between backward and the next one: then they must be visible as ``.grad``."""

from __future__ import annotations

from typing import Any

from lightning_ssd.step.user_code import functions_used, names_in

_MODULE_HOOKS = (
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "backward",
    "on_before_zero_grad",
    "optimizer_zero_grad",  # zeros instead of None are gradients of the next step
)
_CALLBACK_HOOKS = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
_LATER = ("optimizer_step", "lr_scheduler_step", "on_train_batch_end", "on_train_batch_start", "training_step")

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


def find_late_reader(trainer: Any, module: Any) -> str | None:
    """The first hook that runs after the optimizer's step and mentions ``.grad``, or uses the user's code that does.

    In plain Lightning gradients stay until the next batch has its loss. It takes milliseconds: called once a run.
    """
    for obj in (module, *trainer.callbacks):
        for name in _LATER:
            besides = (*_STOCK, _STOCK_CALLBACK)
            if any(map(_reads_grad, functions_used(type(obj), name, on_object=vars(obj).get(name), besides=besides))):
                return f"{type(obj).__name__}.{name}"
    return None


def has_code_after_backward(closure: Any) -> bool:
    """Whether the closure of a step is not Lightning's own, but one of the user's around it (by `optimizer_step`)."""
    return not type(closure).__module__.endswith(".loops.optimization.automatic")


def _is_overridden(obj: Any, name: str) -> bool:
    if name in vars(obj):
        return True
    owner = next((cls for cls in type(obj).__mro__ if name in vars(cls)), None)
    return owner is not None and not owner.__module__.startswith((*_STOCK, _STOCK_CALLBACK))


def _reads_grad(function: object) -> bool:
    names = names_in(function)
    return "grad" in names and "autograd" not in names  # `torch.autograd.grad` reads none
