"""`LazyParameter`: an offloaded parameter, whose first operation on values makes its owner load them.

[Note: lazy parameters] While a unit is offloaded, its parameters view one shared placeholder of NaN bytes that costs no
memory, and have the class made here. Metadata (shape, dtype, device, ``requires_grad``, ``grad``, hooks) is answered
without values. Any other operation first calls `ModelUnits.load`, which makes the parameters that it is given plain
`nn.Parameter`s on their values: inside a step by fetching their units, outside by mapping their files.

On a GPU a placeholder is on the device, and has stride 0. What depends on strides, or before and after a run on the
device, is therefore asked of a tensor that has the form of what `ModelUnits.load` brings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_ssd.device.on_host import set_grad
from lightning_ssd.errors import ResidencyError
from lightning_ssd.store.tensor_metadata import METADATA, OF_DEVICE, OF_STRIDES, SET_GRAD
from lightning_ssd.units import transforms

if TYPE_CHECKING:
    from lightning_ssd.units.model_units import ModelUnits


def lazy_class(owner: ModelUnits) -> type[nn.Parameter]:
    """The class of offloaded parameters whose values ``owner`` loads."""

    class LazyParameter(nn.Parameter):
        _loader = owner

        @classmethod
        def __torch_function__(
            cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func in (torch.autograd.grad, torch.autograd.backward):
                return _differentiate(func, *args, **kwargs)
            if func == SET_GRAD:
                return set_grad(args[0], args[1], owner.host)
            if func not in METADATA:
                tensors = list(tensors_in((args, kwargs)))
                lazy = [p for p in tensors if type(p) is LazyParameter]
                owner.load(lazy, [p for p in tensors if type(p) is not LazyParameter])
            with torch._C.DisableTorchFunctionSubclass():
                if func in OF_STRIDES or (func in OF_DEVICE and owner.loads_to_host):
                    args = tuple(_in_loaded_form(a, func, owner) if type(a) is LazyParameter else a for a in args)
            return owner.host.run(func, args, kwargs)

        def as_subclass(self, cls: type[Tensor]) -> Tensor:  # type: ignore[override]
            # Not through __torch_function__ either: torch does not let it be overridden there.
            owner.load([self])
            return Tensor.as_subclass(self, cls)

        def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
            # Through __torch_function__ torch (up to 2.10) loses a reference to the class, and with it to the session.
            with torch._C.DisableTorchFunctionSubclass():
                return Tensor.is_contiguous(_in_loaded_form(self, Tensor.is_contiguous, owner), *args, **kwargs)

        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
            # Not through __torch_function__: nn.Parameter looks at type(self) before it touches a value.
            if id(self) in memo:
                return memo[id(self)]  # type: ignore[no-any-return]
            owner.load([self])
            return nn.Parameter.__deepcopy__(self, memo)  # type: ignore[no-any-return, no-untyped-call]

    return LazyParameter


def _in_loaded_form(param: nn.Parameter, func: Any, owner: ModelUnits) -> Tensor:
    """A tensor that ``func`` returns the same for as for ``param`` once that is loaded."""
    if param.device.type == "cpu":
        return param
    if func in OF_STRIDES:
        stride = owner.stride_of(param)
        like = torch.empty(param.shape, dtype=param.dtype, device="meta")
        return like if stride is None else like.as_strided(param.shape, stride)
    return torch.empty((), dtype=param.dtype).expand(param.shape)


def _differentiate(
    func: Callable[..., Any], outputs: Any, inputs: Any = None, *, materialize_grads: bool = False, **kwargs: Any
) -> Any:
    """`torch.autograd.grad` or `backward`, as torch passes them on: lazy parameters among ``inputs`` are not loaded.

    Both take edges of the graph instead of tensors. Unlike other functions they are called with ``__torch_function__``
    on, since hooks and recomputes in them run forwards.
    """
    load_all([p for p in tensors_in((outputs, kwargs.get("grad_outputs"), kwargs.get("grad_tensors"))) if _is_lazy(p)])
    load_all([p for p in inputs or () if _is_lazy(p) and not p.requires_grad])  # torch refuses it
    with torch._C.DisableTorchFunctionSubclass():
        places = inputs and [torch.autograd.graph.get_gradient_edge(p) if _is_lazy(p) else p for p in inputs]
    if not materialize_grads:
        return func(outputs, inputs=places, **kwargs)
    grads = func(outputs, inputs=places, **(kwargs | {"allow_unused": True}))
    zeros = functools.partial(torch.zeros_like, requires_grad=kwargs["create_graph"])
    return tuple(zeros(p) if grad is None else grad for p, grad in zip(inputs, grads, strict=True))


def _is_lazy(value: Any) -> bool:
    return hasattr(type(value), "_loader")


def load_all(params: Sequence[nn.Parameter]) -> None:
    """Load the lazy ones of ``params``, all at the same time."""
    for owner, lazy in by_loader(params):
        owner.load(lazy)


def by_loader(params: Sequence[nn.Parameter]) -> list[tuple[ModelUnits, list[nn.Parameter]]]:
    """The lazy ones of ``params``, by their loader."""
    found: dict[int, tuple[ModelUnits, list[nn.Parameter]]] = {}
    for param in params:
        owner = getattr(type(param), "_loader", None)
        if owner is not None:
            found.setdefault(id(owner), (owner, []))[1].append(param)
    return list(found.values())


def require_loaded(module: nn.Module) -> None:
    """Refuse to run ``module`` under torch.func on parameters that were lazy when the transform took them.

    Raises:
        ResidencyError: Names the module and the way out.
    """
    for name, param in module.named_parameters():
        if _is_lazy(transforms.unwrapped(param)) and not _is_lazy(param):
            raise ResidencyError(
                f"torch.func was given parameter {name!r} of a {type(module).__name__} whose values are on disk; torch "
                "takes tensors apart where nothing can bring them: call it inside `with "
                "lightning_ssd.gathered(module):`"
            )


def tensors_in(value: Any) -> Iterator[Any]:
    """Tensors inside nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
