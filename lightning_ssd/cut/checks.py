"""Which models can be streamed at all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.store.dtypes import TORCH_DTYPE
from lightning_ssd.store.strides import is_dense


def require_streamable(root: nn.Module) -> None:
    """Refuse a model with a parameter that cannot be streamed.

    Raises:
        ConfigurationError: Names the parameter and the way out.
    """
    for name, param in root.named_parameters():
        _require_manageable(name, param)
    _require_apart(dict(root.named_parameters()), dict(root.named_buffers()))


def _require_manageable(name: str, param: nn.Parameter) -> None:
    if isinstance(param, nn.parameter.UninitializedParameter):
        raise ConfigurationError(
            f"parameter {name!r} has no shape yet (a lazy module); run one forward of the model, or give the module "
            "its sizes, before the Trainer starts"
        )
    if type(param) is not nn.Parameter:
        raise ConfigurationError(
            f"parameter {name!r} is a {type(param).__name__}, a special tensor class; strategy='ssd_offload' streams "
            "plain torch.nn.Parameter only: load the model without quantised or wrapped weights"
        )
    if param.layout != torch.strided:
        raise ConfigurationError(f"parameter {name!r} is {param.layout}; only strided (dense) parameters are streamed")
    if param.dtype not in TORCH_DTYPE.values():
        way_out = (
            "keep its real and imaginary parts in a float64 parameter and join them in forward with "
            "torch.view_as_complex, or make it complex64"
            if param.is_complex()
            else "convert it before the Trainer starts"
        )
        raise ConfigurationError(
            f"parameter {name!r} is {param.dtype}, which a safetensors file cannot hold; {way_out}"
        )
    if not is_dense(param.shape, param.stride()):
        # A file has no gaps. Without them torch may add in another order, so the run would not be plain Lightning's.
        raise ConfigurationError(
            f"parameter {name!r} (shape {tuple(param.shape)}, strides {param.stride()}) is a part of a larger tensor, "
            "or shows elements of it more than once; strategy='ssd_offload' streams parameters without gaps, in any "
            "order of dimensions: before the Trainer starts, use nn.Parameter(p.detach().contiguous())"
        )


def _require_apart(params: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor]) -> None:
    """Refuse parameters that share memory: units have memory of their own, which would untie them."""
    places: dict[tuple[object, int], list[tuple[int, int, str]]] = {}
    for name, tensor in itertools.chain(params.items(), buffers.items()):
        if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta and tensor.is_contiguous():
            key = (tensor.device, tensor.untyped_storage().data_ptr())
            places.setdefault(key, []).append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name))
    for stretches in places.values():
        for (_, end, name), (begin, _, other) in itertools.pairwise(sorted(stretches)):
            if begin < end and (name in params or other in params):
                names = sorted((name, other), key=lambda each: each not in params)
                buffer = names.pop() if names[1] in buffers else None
                raise ConfigurationError(
                    f"parameters {name!r} and {other!r} share memory (one was assigned to .data of the other); "
                    "strategy='ssd_offload' gives each its own, which would untie them: make them one parameter "
                    "(module.weight = other.weight), or copy the values (.data.copy_)"
                    if buffer is None
                    else f"buffer {buffer!r} views the memory of parameter {names[0]!r}; strategy='ssd_offload' gives "
                    "the parameter memory of its own, so the buffer would keep the values of now: clone it when it is "
                    "registered (register_buffer(name, weight.detach().clone())) if that is meant, or use the "
                    "parameter where the buffer is used"
                )
