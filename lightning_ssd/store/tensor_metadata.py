"""What of a tensor can be asked without its values: shape, dtype, device, hooks, and new tensors of its form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def _accessors() -> Iterator[Any]:
    read_only = (
        "shape dtype device layout ndim itemsize nbytes grad_fn is_leaf is_cpu is_cuda is_meta is_mps is_mkldnn "
        "is_nested is_quantized is_sparse is_sparse_csr is_vulkan is_xla is_xpu is_mtia is_ipu is_maia names name "
        "output_nr retains_grad _version _base _has_symbolic_sizes_strides"
    )
    writable = "requires_grad grad _grad _backward_hooks _post_accumulate_grad_hooks grad_dtype"
    for name in (read_only + " " + writable).split():
        attribute: Any = getattr(Tensor, name, None)
        if hasattr(attribute, "__get__"):
            yield attribute.__get__
        if name in writable.split() and hasattr(attribute, "__set__"):
            yield attribute.__set__
            yield attribute.__delete__


def functions_of_form() -> Iterator[Any]:
    """Methods of tensors, and functions of torch, that need no values."""
    methods = (
        "size dim ndimension numel nelement stride is_contiguous element_size storage_offset requires_grad_ "
        "register_hook register_post_accumulate_grad_hook is_floating_point is_complex is_signed is_inference "
        "get_device has_names dim_order __len__ _is_view new_zeros new_ones new_empty new_full new_tensor"
    )
    functions = (
        "numel is_floating_point is_complex is_signed is_inference get_device empty_like zeros_like ones_like "
        "full_like rand_like randn_like randint_like result_type can_cast promote_types"
    )
    yield from (getattr(Tensor, name) for name in methods.split() if hasattr(Tensor, name))
    yield from (getattr(torch, name) for name in functions.split() if hasattr(torch, name))


METADATA = frozenset([*_accessors(), *functions_of_form()])
"""As ``__torch_function__`` is given them."""
SET_GRAD = vars(torch._C.TensorBase)["grad"].__set__
OF_STRIDES = frozenset([Tensor.stride, Tensor.storage_offset, Tensor.is_contiguous, Tensor.dim_order])
FACTORIES = frozenset(f for f in functions_of_form() if f.__name__.startswith("new_") or f.__name__.endswith("_like"))
OF_DEVICE = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in ("device", "is_cpu", "is_cuda")),
        *(f for f in functions_of_form() if f.__name__ == "get_device"),
        *FACTORIES,
    ]
)
