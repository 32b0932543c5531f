"""torch's own transformer layers in evaluation: the fused path that plain Lightning takes, which looks for our traces.

`nn.TransformerEncoderLayer` leaves its fused kernel where a module has forward hooks, `nn.TransformerEncoder` where a
parameter of its first layer has a class of its own, as at rest. Its numbers differ from those of the other path in the
last bits, and at padded places by more. So the hooks of such a layer are around its ``forward``, and its first layer is
brought before an encoder looks at it.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from lightning_ssd.units.lazy_param import load_all


class ForwardHooks(Protocol):
    """What is called around the forward of a module."""

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """As a forward pre-hook with keyword arguments."""
        ...

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """As a forward hook with keyword arguments; while the exception is handled after a failure."""
        ...


class Removable(Protocol):
    """Undoes a hook."""

    def remove(self) -> None:
        """Undo it."""
        ...


def hook(module: nn.Module, hooks: ForwardHooks) -> list[Removable]:
    """Call ``hooks`` around every forward of ``module``; what is returned undoes it."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return [_Forward(module, hooks)]
    before = module.register_forward_pre_hook(hooks.before, prepend=True, with_kwargs=True)
    return [before, module.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)]


def hook_encoders(root: nn.Module) -> list[Removable]:
    """Bring the first layer of each `nn.TransformerEncoder` before it asks whether it may take the fused path."""
    encoders = [module for module in root.modules() if isinstance(module, nn.TransformerEncoder)]
    return [encoder.register_forward_pre_hook(_bring_first_layer) for encoder in encoders]


def _bring_first_layer(encoder: nn.TransformerEncoder, args: Any) -> None:
    first = encoder.layers[0]
    if not first.training and not torch.is_grad_enabled():
        load_all(list(first.parameters()))


class _Forward:
    """The forward of one module, with hooks that nobody sees; a copy of the module has the plain one."""

    def __init__(self, module: nn.Module, hooks: ForwardHooks) -> None:
        self._module = module
        self._hooks = hooks
        self._before: Callable[..., Any] | None = vars(module).get("forward")
        self._forward = module.forward
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._hooks.before(self._module, args, kwargs)
        output = None
        try:
            output = self._forward(*args, **kwargs)
        finally:
            self._hooks.after(self._module, args, kwargs, output)
        return output

    def remove(self) -> None:
        """Give the module its own forward back."""
        if vars(self._module).get("forward") is self:
            del self._module.forward
            if self._before is not None:
                self._module.forward = self._before

    def __reduce__(self) -> Any:
        return types.MethodType, (type(self._module).forward, self._module)  # `copy` and `pickle` both ask here
