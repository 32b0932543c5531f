"""Tensors of a device whose values are on the host: gradients, and parameters that code uses between steps.

[Note: values on the host] In plain Lightning a parameter and its gradient are on the device, whoever looks at them.
Here values that no module computes with are on the host, where they take no device memory. So that code does not
notice, their tensors have the classes made here. They say that they are on the device. Whoever writes to them, or to
their views, writes to the host's memory. All else that is made from them is on the device: a clone, a mask, a norm, a
random tensor like them. Where they meet a tensor of the device, what is not written to is copied to the other side.
The host waits for these copies; code that looks at values makes them, a step without such code none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssd.store.tensor_metadata import FACTORIES, METADATA, SET_GRAD


class HostClasses:
    """Classes of tensors on the host, and functions of them; see [Note: values on the host]. By default torch's own.

    Attributes:
        tensor: Of gradients and of views.
        param: Of parameters.
    """

    tensor: type[Tensor] = Tensor
    param: type[nn.Parameter] = nn.Parameter

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func`` does."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


PLAIN = HostClasses()


def host_classes(device: torch.device) -> HostClasses:
    """Classes of tensors that are said to be on ``device``."""
    return PLAIN if device.type == "cpu" else _OfDevice(device)


def plain(tensor: Tensor) -> Tensor:
    """``tensor`` as one of torch's own class on the host; if it is on the host, on the same memory."""
    with torch._C.DisableTorchFunctionSubclass():
        if type(tensor) is Tensor and tensor.device.type == "cpu":
            return tensor
        return tensor.detach().cpu()  # sync: only if it was on the device


def make_plain(param: nn.Parameter) -> None:
    """Let a parameter on the host, and its gradient, be what they are; what it was given on the device comes, too."""
    with torch._C.DisableTorchFunctionSubclass():
        if hasattr(type(param), "is_said_elsewhere"):
            param.data = param.data.cpu()  # sync: only if it was on the device
            param.__class__ = nn.Parameter
        if param.grad is not None and hasattr(type(param.grad), "is_said_elsewhere"):
            param.grad.__class__ = Tensor


def set_grad(param: nn.Parameter, grad: Tensor | None, classes: HostClasses) -> None:
    """``param.grad = grad`` on the host, wherever the parameter is; other code sees the gradient beside it."""
    # Torch refuses a gradient of another device when it is set, but not that its data changes afterwards. That the
    # parameter changed its device for a moment would end its place in graphs that are still needed.
    with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
        is_odd = grad is None or grad.shape != param.shape or grad.layout != torch.strided
        is_right = (
            grad is not None and grad.device == param.device and (classes is PLAIN or type(grad) is classes.tensor)
        )
        if grad is None or is_odd or is_right:
            param.grad = grad
        else:
            cls = classes.tensor if type(grad) is Tensor else type(grad)
            param.grad = torch.empty_strided(param.shape, [0] * param.dim(), dtype=grad.dtype, device=param.device)
            param.grad.data = plain(grad)
            param.grad.__class__ = cls


class _OfDevice(HostClasses):
    """The classes of one device."""

    def __init__(self, device: torch.device) -> None:
        self.tensor, self.param = _make_tensor_class(self), _make_param_class(self)
        self._device = device
        self._process = os.getpid()
        self._answers: Mapping[Any, Any] = {
            Tensor.device.__get__: device,
            Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
            Tensor.is_cuda.__get__: device.type == "cuda",  # type: ignore[attr-defined]
            Tensor.get_device: device.index or 0,
            torch.get_device: device.index or 0,
        }

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func`` does, as if all were on the device."""
        if func in (torch.autograd.grad, torch.autograd.backward):
            return self._differentiate(func, *args, **kwargs)  # hooks in it run forwards, with functions as they are
        with torch._C.DisableTorchFunctionSubclass():
            if os.getpid() != self._process:  # a forked process has no device
                return func(*args, **kwargs)
            if func == SET_GRAD:
                return set_grad(args[0], args[1], self)
            if self._is_on_host(args[0] if args else None):
                if func in self._answers:
                    return self._answers[func]
                if func in _MOVES:
                    return self._move(func, *args, **kwargs)
            if func in FACTORIES:
                kwargs = {"device": self._device} | {k: v for k, v in kwargs.items() if k != "device" or v is not None}
            if func in METADATA or func == _SET_DATA:
                return func(*args, **kwargs)
            if func is Tensor.__iter__:
                return iter(self._compute(Tensor.unbind, args, {}))
            return self._compute(func, args, kwargs)

    def _compute(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors: list[Tensor] = []
        _each((args, kwargs), tensors.append)
        here = [t for t in tensors if self._is_on_host(t)]
        there = [t for t in tensors if t.device.type != "cpu"]
        targets: list[Tensor] = []
        if _is_in_place(func, kwargs):
            _each(kwargs.get("out", args[:1] or kwargs.get("tensor")), targets.append)
        if _is_random(func) and here:
            return self._on_device(func, args, kwargs, targets)
        if not there:
            return self._as_on_device(func(*args, **kwargs), tensors, here)
        if targets and all(t.device.type == "cpu" for t in targets):
            args, kwargs = _each((args, kwargs), lambda t: t.to("cpu"))  # sync: compute
            return func(*args, **kwargs)
        return self._on_device(func, args, kwargs, [t for t in targets if self._is_on_host(t)])

    def _on_device(self, func: Callable[..., Any], args: Any, kwargs: Any, targets: list[Tensor]) -> Any:
        """Run ``func`` on copies of the device, and take what it writes to ``targets`` back."""
        copies: dict[Tensor, Tensor] = {}

        def send(tensor: Tensor) -> Tensor:
            if not self._is_on_host(tensor):
                return tensor
            if tensor not in copies:
                copies[tensor] = tensor.to(self._device)
            return copies[tensor]

        args, kwargs = _each((args, kwargs), send)
        found = func(*args, **kwargs)
        for target in targets:
            target.detach().copy_(copies[target])  # sync: compute
        originals = {made: tensor for tensor, made in copies.items() if any(tensor is target for target in targets)}
        return _each(found, lambda t: originals.get(t, t))

    def _as_on_device(self, found: Any, tensors: list[Tensor], here: list[Tensor]) -> Any:
        """What a function made on the host: itself if it is an argument or a view of one, else a copy on the device."""
        storages = {t.untyped_storage()._cdata for t in here}
        is_mixed = len(here) < sum(t.dim() > 0 or self._is_on_host(t) for t in tensors)  # on the device it would fail

        def place(tensor: Tensor) -> Tensor:
            if is_mixed or any(tensor is t for t in tensors) or tensor.layout != torch.strided:
                return tensor
            if tensor.untyped_storage()._cdata in storages:
                tensor.__class__ = self.tensor
                return tensor
            return tensor.to(self._device)

        return _each(found, place)

    def _move(self, func: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``tensor.cpu()``, ``cuda()`` or ``to(...)``."""
        if func is Tensor.cpu:
            return tensor.clone()
        if func is Tensor.cuda:
            return tensor
        if args and isinstance(args[0], Tensor):
            args = (self._device if self._is_on_host(args[0]) else args[0].device, args[0].dtype, *args[1:])
        target, dtype, _, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        if target is not None and target.type == "cpu":
            return tensor.clone().to(*args, **kwargs)
        is_same = dtype in (None, tensor.dtype) and not kwargs.get("copy", args[3:4] == (True,))
        is_here = target is None or (target.type == self._device.type and target.index in (None, self._device.index))
        return tensor if is_same and is_here else tensor.to(self._device if is_here else target, dtype, copy=True)

    def _differentiate(self, func: Callable[..., Any], outputs: Any, inputs: Any = None, **kwargs: Any) -> Any:
        edge = torch.autograd.graph.get_gradient_edge
        with torch._C.DisableTorchFunctionSubclass():
            is_param = [isinstance(each, self.param) and each.requires_grad for each in inputs or ()]
            places = inputs and [edge(i) if is_mine else i for i, is_mine in zip(inputs, is_param, strict=True)]
        return func(outputs, inputs=places, **kwargs)

    def _is_on_host(self, value: Any) -> bool:
        return (
            isinstance(value, (self.tensor, self.param)) and value.device.type == "cpu"
        )  # a parameter may be given other data


def is_lazy(types: Iterable[type]) -> bool:
    """Whether a parameter is among them whose values are not loaded; its class loads them, and runs the function."""
    return any(hasattr(cls, "_loader") for cls in types)


def _make_tensor_class(owner: HostClasses) -> type[Tensor]:
    class HostTensor(Tensor):
        is_said_elsewhere = True

        @classmethod
        def __torch_function__(cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
            return NotImplemented if is_lazy(types) else owner.run(func, args, kwargs or {})

        def __reduce_ex__(self, protocol: Any) -> Any:
            return plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            if id(self) not in memo:
                memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
            return memo[id(self)]

    return HostTensor


def _make_param_class(owner: HostClasses) -> type[nn.Parameter]:
    class HostParameter(nn.Parameter):
        is_said_elsewhere = True

        @classmethod
        def __torch_function__(cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
            return NotImplemented if is_lazy(types) else owner.run(func, args, kwargs or {})

        def __reduce_ex__(self, protocol: Any) -> Any:
            return nn.Parameter(plain(self), self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            if id(self) not in memo:
                memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
            return memo[id(self)]

    return HostParameter


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_MOVES = frozenset([Tensor.cpu, Tensor.cuda, Tensor.to])
_RANDOM = _names(
    "normal_ uniform_ random_ bernoulli_ exponential_ geometric_ cauchy_ log_normal_ bernoulli multinomial "
    "normal poisson dropout dropout_ alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d "
    "dropout3d rrelu rrelu_ gumbel_softmax"
)
_IN_PLACE = _names(
    "__setitem__ __iadd__ __isub__ __imul__ __imatmul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ "
    "__ior__ __ixor__ __ilshift__ __irshift__ __set__"
)


def _is_in_place(func: Any, kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None


def _is_random(func: Any) -> bool:
    return getattr(func, "__name__", "") in _RANDOM or getattr(func, "__module__", "") == "torch.nn.init"


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``value`` with ``change(tensor)`` in place of each tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_each(each, change) for each in value)
    if isinstance(value, (tuple, list)):
        return type(value)([_each(each, change) for each in value])
    if isinstance(value, dict):
        return {key: _each(each, change) for key, each in value.items()}
    return value
