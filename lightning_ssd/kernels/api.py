"""Arithmetic of the CPU update on flat host tensors: fused Adam and SGD, sums of squares, conversions, checksums.

The native module computes it if it was built, else `kernels.reference`, with the same results. Tensors are 1D,
contiguous and on the CPU. State is float32; a gradient or an ``out`` may be float32, bfloat16 or float16. In-place
updates do not change autograd's version counters.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_ssd._extension import _native
from lightning_ssd.kernels import reference
from lightning_ssd.kernels.options import AdamOptions, SGDOptions
from lightning_ssd.kernels.torch_sqrt import torch_sqrt

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    options: AdamOptions,
    *,
    out: Tensor | None = None,
) -> None:
    """One Adam or AdamW step, in place.

    Args:
        param: float32 master values, updated.
        grad: Gradient; widened exactly to float32, not changed.
        exp_avg: float32 first moment, updated.
        exp_avg_sq: float32 second moment, updated.
        options: Settings of the step.
        out: Receives the updated values in its own dtype in the same pass.

    Raises:
        ValueError: A tensor's dtype, shape, device or layout does not fit, or the step is below 1.
    """
    _check_update(param, grad, out, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    require_step(options)
    update = _native_adam_ if is_native() else reference.adam_
    update(param, grad, exp_avg, exp_avg_sq, options, out=out)


def sgd_(
    param: Tensor, grad: Tensor, momentum: Tensor | None, options: SGDOptions, *, out: Tensor | None = None
) -> None:
    """One SGD step, in place.

    Args:
        param: float32 master values, updated.
        grad: Gradient; widened exactly to float32, not changed.
        momentum: float32 momentum buffer, updated; None if and only if the momentum factor is 0.
        options: Settings of the step.
        out: Receives the updated values in its own dtype in the same pass.

    Raises:
        ValueError: A tensor's dtype, shape, device or layout does not fit, or the momentum buffer is missing.
    """
    if (momentum is None) != (options.momentum_factor == 0):
        given = "is missing" if momentum is None else "was given"
        raise ValueError(f"momentum buffer {given} with momentum_factor={options.momentum_factor}")
    _check_update(param, grad, out, **({} if momentum is None else {"momentum": momentum}))
    update = _native_sgd_ if is_native() else reference.sgd_
    update(param, grad, momentum, options, out=out)


def sum_of_squares(t: Tensor) -> tuple[float, bool]:
    """Sum of squares in float64, and whether every element is finite, in one pass.

    The result does not depend on the number of threads of the native module.

    Raises:
        ValueError: The tensor's dtype, shape, device or layout does not fit.
    """
    check("t", t, None)
    if not is_native():
        return reference.sum_of_squares(t)
    total = float(_native.sum_of_squares(t.data_ptr(), _code(t), t.numel()))
    return total, math.isfinite(total)  # the squares of finite float32 values cannot overflow float64


def convert_(dst: Tensor, src: Tensor) -> None:
    """Copy ``src`` into ``dst`` in ``dst``'s dtype, with the bits of ``src.to(dst.dtype)``.

    Raises:
        ValueError: A tensor's dtype, shape, device or layout does not fit.
    """
    check("src", src, None)
    check("dst", dst, src.numel())
    if is_native():
        _native.convert(dst.data_ptr(), _code(dst), src.data_ptr(), _code(src), src.numel())
    else:
        reference.convert_(dst, src)


def crc32c(address: int, nbytes: int, initial: int = 0) -> int:
    """CRC32C (Castagnoli) of memory.

    Args:
        address: Address of the first byte; the caller keeps the memory alive.
        nbytes: Number of bytes.
        initial: CRC32C of the bytes before these, which this one continues.

    Raises:
        ValueError: An argument is out of range.
    """
    if nbytes < 0 or not 0 <= initial < 2**32 or (address <= 0 and nbytes > 0):
        raise ValueError(f"cannot checksum {nbytes} bytes at address {address} from {initial}")
    if is_native():
        return int(_native.crc32c(address, nbytes, initial))
    return reference.crc32c(address, nbytes, initial)


def crc32c_each(address: int, nbytes: int, piece_nbytes: int) -> list[int]:
    """CRC32C of each ``piece_nbytes`` bytes of memory.

    Args:
        address: Address of the first byte; the caller keeps the memory alive.
        nbytes: Number of bytes in all.
        piece_nbytes: Bytes of a piece; the last one may be shorter.

    Raises:
        ValueError: An argument is out of range.
    """
    if nbytes < 0 or piece_nbytes <= 0 or (address <= 0 and nbytes > 0):
        raise ValueError(f"cannot checksum {nbytes} bytes at address {address} in pieces of {piece_nbytes}")
    if is_native():
        return list(_native.crc32c_each(address, nbytes, piece_nbytes))
    begins = range(0, nbytes, piece_nbytes)
    return [reference.crc32c(address + begin, min(piece_nbytes, nbytes - begin), 0) for begin in begins]


def is_native() -> bool:
    """Whether the native kernels are in use."""
    return _native is not None


@cache
def is_bit_equal_to_torch() -> bool:
    """Whether these kernels give the bits of torch.optim's for-loop path on this machine; tried once, on random data.

    Always true without the native module: the reference runs the same torch operations.
    """
    return all(_same_bits(numel, grad_dtype) for numel in (1, 15, 1003, 40_007) for grad_dtype in _DTYPES)


def describe() -> str:
    """The kernels in use, for the summary at the start of a run: ``'native avx512, 2 threads'``."""
    if is_native():
        root = " (Adam's square roots by torch's own function)" if torch_sqrt()[0] is _native.SqrtForm.external else ""
        return f"native {_native.kernel_level()}, {_native.num_kernel_threads()} threads{root}"
    return f"torch, {torch.get_num_threads()} threads"


def _check_update(param: Tensor, grad: Tensor, out: Tensor | None, **states: Tensor) -> None:
    numel = param.numel()
    check("param", param, None, torch.float32)
    check("grad", grad, numel)
    for name, state in states.items():
        check(name, state, numel, torch.float32)
    if out is not None:
        check("out", out, numel)


def check(name: str, t: Tensor, numel: int | None, dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor that the kernels cannot work on.

    Args:
        name: What the message calls it.
        t: The tensor.
        numel: Elements it must have, if given.
        dtype: What it must be; None for any dtype that a gradient may have.

    Raises:
        ValueError: Names the tensor and the rule it breaks.
    """
    if dtype is not None and t.dtype != dtype:
        raise ValueError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {t.dtype}")
    if dtype is None and t.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    if t.device.type != "cpu":
        raise ValueError(f"{name} must be on the cpu, is on {t.device}")
    if t.dim() != 1 or not t.is_contiguous():
        raise ValueError(f"{name} must be 1D and contiguous, has shape {tuple(t.shape)} and strides {t.stride()}")
    if numel is not None and t.numel() != numel:
        raise ValueError(f"{name} must have {numel} elements like its partner, has {t.numel()}")


def require_step(options: AdamOptions) -> None:
    """Refuse a step that is none.

    Raises:
        ValueError: It is below 1.
    """
    if options.step < 1:
        raise ValueError(f"step counts from 1, got {options.step}")


def adam_arguments(grad: Tensor, options: AdamOptions, out: Tensor | None = None) -> dict[str, Any]:
    """What the native kernel takes beside the state."""
    o, (beta1, beta2) = options, options.betas
    sqrt_form, external_sqrt, set_external_threads = torch_sqrt()
    # In Python floats, as torch.optim computes them; the kernel rounds each to float32 once.
    return {
        "grad": grad.data_ptr(),
        "grad_dtype": _code(grad),
        **dict(zip(("out", "out_dtype"), _out_arguments(out), strict=True)),
        "grad_scale": o.grad_scale,
        "maximize": o.maximize,
        "decay": 1 - o.lr * o.weight_decay if o.decoupled else 1.0,
        "penalty": 0.0 if o.decoupled else o.weight_decay,
        "beta1": beta1,
        "beta2": beta2,
        "step_size": o.lr / (1 - beta1**o.step),
        "bias2_sqrt": (1 - beta2**o.step) ** 0.5,
        "eps": o.eps,
        "sqrt_form": sqrt_form,
        "external_sqrt": external_sqrt,
        "set_external_threads": set_external_threads,
    }


def _native_adam_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, options: AdamOptions, *, out: Tensor | None
) -> None:
    _native.adam(
        param=param.data_ptr(),
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=exp_avg_sq.data_ptr(),
        numel=param.numel(),
        **adam_arguments(grad, options, out),
    )


def _native_sgd_(
    param: Tensor, grad: Tensor, momentum: Tensor | None, options: SGDOptions, *, out: Tensor | None
) -> None:
    _native.sgd(
        param.data_ptr(),
        grad.data_ptr(),
        _code(grad),
        0 if momentum is None else momentum.data_ptr(),
        *_out_arguments(out),
        param.numel(),
        grad_scale=options.grad_scale,
        maximize=options.maximize,
        penalty=options.weight_decay,
        momentum_factor=options.momentum_factor,
        dampening=options.dampening,
        nesterov=options.nesterov,
        first_step=options.first_step,
        lr=options.lr,
    )


def _code(t: Tensor) -> Any:
    return getattr(_native.Dtype, _DTYPES[t.dtype])


def _out_arguments(out: Tensor | None) -> tuple[int, Any]:
    return (0, _native.Dtype.float32) if out is None else (out.data_ptr(), _code(out))


def _same_bits(numel: int, grad_dtype: torch.dtype) -> bool:
    """Whether one AdamW and one SGD step on random state equal the reference's, bit for bit."""
    generator = torch.Generator().manual_seed(numel)
    state = torch.randn(4, numel, generator=generator)
    state[2].square_()
    grad = state[3].to(grad_dtype)
    adam_options = AdamOptions(7, 1e-2, (0.9, 0.99), eps=1e-8, weight_decay=0.1, decoupled=True, grad_scale=0.7)
    sgd_options = SGDOptions(1e-2, 0.9, 0.1, nesterov=True, weight_decay=0.1, first_step=False, grad_scale=0.7)
    ours, theirs = state.clone(), state.clone()
    for tensors, adam, sgd in ((ours, adam_, sgd_), (theirs, reference.adam_, reference.sgd_)):
        param, exp_avg, exp_avg_sq, momentum = tensors.unbind()
        adam(param, grad, exp_avg, exp_avg_sq, adam_options, out=None)
        sgd(param, grad, momentum, sgd_options, out=None)
    return torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
