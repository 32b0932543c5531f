"""Keeps torch's fused path for transformer layers in evaluation, so that results are bit-equal to plain Lightning's.

`nn.TransformerEncoderLayer` does not use its fused kernel if a module has forward hooks, nor `nn.TransformerEncoder` if
a parameter of its first layer is of a subclass, as lazy parameters are. The results of the two paths differ in the last
bits, and at padded positions by more. So such a layer gets no hooks but a wrapper around its ``forward``, and the first
layer of an encoder is fetched before the encoder checks it.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from lightning_ssd.units.lazy_param import load_all

if TYPE_CHECKING:
    from lightning_ssd.step.module_hooks import HooksOfModule


class Removable(Protocol):
    """A handle that removes a hook."""

    def remove(self) -> None:
        """Remove the hook."""
        ...


def hook(module: nn.Module, hooks: HooksOfModule) -> list[Removable]:
    """Call ``hooks`` around every forward of ``module``; returns the handles that remove them."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return [_Forward(module, hooks)]
    before = module.register_forward_pre_hook(hooks.before, prepend=True, with_kwargs=True)
    return [before, module.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)]


def hook_encoders(root: nn.Module) -> list[Removable]:
    """Fetch the first layer of each `nn.TransformerEncoder` before it checks whether it may use the fused path."""
    encoders = [module for module in root.modules() if isinstance(module, nn.TransformerEncoder)]
    return [encoder.register_forward_pre_hook(_fetch_first_layer) for encoder in encoders]


def _fetch_first_layer(encoder: nn.TransformerEncoder, args: Any) -> None:
    first = encoder.layers[0]
    if not first.training and not torch.is_grad_enabled():
        load_all(list(first.parameters()))


class _Forward:
    """Wraps the forward of one module, so that torch sees no hooks. Copies of the module have the plain forward."""

    def __init__(self, module: nn.Module, hooks: HooksOfModule) -> None:
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
        return types.MethodType, (type(self._module).forward, self._module)  # called by `copy` and by `pickle`
