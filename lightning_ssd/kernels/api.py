"""Arithmetic of the CPU update on flat host tensors: fused Adam and SGD, norms, casts, checksums.

Runs in the native module where it was built, else through ``reference`` with the same results. Tensors are 1D,
contiguous, on the CPU; state is float32, a gradient or an ``out`` may be float32, bfloat16 or float16. In-place
updates do not move autograd's version counters.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_ssd._extension import _native
from lightning_ssd.kernels import reference
from lightning_ssd.kernels.torch_sqrt import torch_sqrt

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    out: Tensor | None = None,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """One Adam (or, with ``decoupled``, AdamW) step, in place.

    Args:
        param: float32 master values, updated.
        grad: Gradient; widened exactly to float32, left as it is.
        exp_avg: float32 first moment, updated.
        exp_avg_sq: float32 second moment, updated.
        out: Receives the updated values in its own dtype in the same pass.
        step: Number of this step; 1 for the first.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the denominator.
        weight_decay: Decay of the weights, or L2 penalty if not ``decoupled``.
        decoupled: AdamW's weight decay instead of Adam's L2 penalty.
        maximize: Step along the gradient instead of against it.
        grad_scale: Factor on the gradient, applied first and rounded to float32; 1.0 does nothing.

    Raises:
        ValueError: If a tensor's dtype, shape, device or layout does not fit, or ``step`` is below 1.
    """
    _check_update(param, grad, out, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    update = _native_adam_ if is_native() else reference.adam_
    update(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        out=out,
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        maximize=maximize,
        grad_scale=grad_scale,
    )


def sgd_(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    *,
    out: Tensor | None = None,
    lr: float,
    momentum_factor: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool = False,
    first_step: bool,
    grad_scale: float = 1.0,
) -> None:
    """One SGD step, in place.

    Args:
        param: float32 master values, updated.
        grad: Gradient; widened exactly to float32, left as it is.
        momentum: float32 momentum buffer, updated; ``None`` if and only if ``momentum_factor`` is 0.
        out: Receives the updated values in its own dtype in the same pass.
        lr: Learning rate.
        momentum_factor: Decay of the momentum buffer; 0 is plain SGD.
        dampening: Taken off the gradient's weight in the buffer.
        nesterov: Look ahead along the new momentum.
        weight_decay: L2 penalty.
        maximize: Step along the gradient instead of against it.
        first_step: The momentum buffer holds nothing yet and becomes a copy of the gradient.
        grad_scale: Factor on the gradient, applied first and rounded to float32; 1.0 does nothing.

    Raises:
        ValueError: If a tensor's dtype, shape, device or layout does not fit, or momentum is missing.
    """
    if (momentum is None) != (momentum_factor == 0):
        given = "is missing" if momentum is None else "was given"
        raise ValueError(f"momentum buffer {given} with momentum_factor={momentum_factor}")
    if momentum is None:
        _check_update(param, grad, out)
    else:
        _check_update(param, grad, out, momentum=momentum)
    update = _native_sgd_ if is_native() else reference.sgd_
    update(
        param,
        grad,
        momentum,
        out=out,
        lr=lr,
        momentum_factor=momentum_factor,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay=weight_decay,
        maximize=maximize,
        first_step=first_step,
        grad_scale=grad_scale,
    )


def sum_of_squares(t: Tensor) -> tuple[float, bool]:
    """Sum of squares in float64, and whether every element is finite, in one pass.

    The native sum does not depend on the number of threads.

    Raises:
        ValueError: If the tensor's dtype, shape, device or layout does not fit.
    """
    _check("t", t, None)
    if not is_native():
        return reference.sum_of_squares(t)
    total = float(_native.sum_of_squares(t.data_ptr(), _code(t), t.numel()))
    return total, math.isfinite(total)  # a sum of finite float32 squares is far below float64's largest


def convert_(dst: Tensor, src: Tensor) -> None:
    """Copy ``src`` into ``dst`` in ``dst``'s dtype, with the bits of ``src.to(dst.dtype)``.

    Raises:
        ValueError: If a tensor's dtype, shape, device or layout does not fit.
    """
    _check("src", src, None)
    _check("dst", dst, src.numel())
    if is_native():
        _native.convert(dst.data_ptr(), _code(dst), src.data_ptr(), _code(src), src.numel())
    else:
        reference.convert_(dst, src)


def crc32c(address: int, nbytes: int, initial: int = 0) -> int:
    """CRC32C (Castagnoli) of memory.

    Args:
        address: Address of the first byte; the caller keeps the memory alive.
        nbytes: Number of bytes.
        initial: CRC32C of the bytes that come before, to continue it.

    Raises:
        ValueError: If an argument is out of range.
    """
    if nbytes < 0 or not 0 <= initial < 2**32 or (address <= 0 and nbytes > 0):
        raise ValueError(f"cannot checksum {nbytes} bytes at address {address} from {initial}")
    if is_native():
        return int(_native.crc32c(address, nbytes, initial))
    return reference.crc32c(address, nbytes, initial)


def crc32c_each(address: int, nbytes: int, piece_nbytes: int) -> list[int]:
    """CRC32C of each piece of memory of ``piece_nbytes`` bytes, of which the last may be shorter.

    Args:
        address: Address of the first byte; the caller keeps the memory alive.
        nbytes: Number of bytes of all pieces.
        piece_nbytes: Bytes of one.

    Raises:
        ValueError: If an argument is out of range.
    """
    if nbytes < 0 or piece_nbytes <= 0 or (address <= 0 and nbytes > 0):
        raise ValueError(f"cannot checksum {nbytes} bytes at address {address} in pieces of {piece_nbytes}")
    if is_native():
        return list(_native.crc32c_each(address, nbytes, piece_nbytes))
    begins = range(0, nbytes, piece_nbytes)
    return [reference.crc32c(address + begin, min(piece_nbytes, nbytes - begin), 0) for begin in begins]


def supports(*, amsgrad: bool = False, capturable: bool = False, differentiable: bool = False) -> bool:
    """Whether ``adam_`` covers an optimizer with these settings; for any other, run its own ``step``."""
    return not (amsgrad or capturable or differentiable)


def is_native() -> bool:
    """Whether the native kernels are in use."""
    return _native is not None


@cache
def is_bit_equal_to_torch() -> bool:
    """Whether these kernels give the bits of torch.optim's for-loop path on this machine; tried once, on random data.

    Without the native module they do: they are the same torch operations.
    """
    return all(_same_bits(numel, grad_dtype) for numel in (1, 15, 1003, 40_007) for grad_dtype in _DTYPES)


def set_num_threads(n: int) -> None:
    """Set the number of native worker threads; without the native module torch's counts.

    At first half of the CPUs, and two where there are two: memory bounds the kernels, and compute needs the rest.

    Raises:
        ValueError: If ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"at least one thread is needed, got {n}")
    if is_native():
        _native.set_num_kernel_threads(n)


def describe() -> str:
    """What does the work, for the start-up summary: ``'native avx512, 2 threads'``."""
    if is_native():
        root = " (Adam's square roots by torch's own function)" if torch_sqrt()[0] is _native.SqrtForm.external else ""
        return f"native {_native.kernel_level()}, {_native.num_kernel_threads()} threads{root}"
    return f"torch, {torch.get_num_threads()} threads"


def _check_update(param: Tensor, grad: Tensor, out: Tensor | None, **states: Tensor) -> None:
    numel = param.numel()
    _check("param", param, None, master=True)
    _check("grad", grad, numel)
    for name, state in states.items():
        _check(name, state, numel, master=True)
    if out is not None:
        _check("out", out, numel)


def _check(name: str, t: Tensor, numel: int | None, *, master: bool = False) -> None:
    """Raise unless ``t`` is a flat host tensor of a dtype we know and of ``numel`` elements if given."""
    if master and t.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {t.dtype}")
    if t.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    if t.device.type != "cpu":
        raise ValueError(f"{name} must be on the cpu, is on {t.device}")
    if t.dim() != 1 or not t.is_contiguous():
        raise ValueError(f"{name} must be 1D and contiguous, has shape {tuple(t.shape)} and strides {t.stride()}")
    if numel is not None and t.numel() != numel:
        raise ValueError(f"{name} must have {numel} elements like its partner, has {t.numel()}")


def _native_adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    out: Tensor | None,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: float,
) -> None:
    beta1, beta2 = betas
    sqrt_form, external_sqrt, set_external_threads = torch_sqrt()
    # All in Python floats, as torch.optim has it: rounded to float32 once, below.
    _native.adam(
        param.data_ptr(),
        grad.data_ptr(),
        _code(grad),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        *_out_arguments(out),
        param.numel(),
        grad_scale=grad_scale,
        maximize=maximize,
        decay=1 - lr * weight_decay if decoupled else 1.0,
        penalty=0.0 if decoupled else weight_decay,
        beta1=beta1,
        beta2=beta2,
        step_size=lr / (1 - beta1**step),
        bias2_sqrt=(1 - beta2**step) ** 0.5,
        eps=eps,
        sqrt_form=sqrt_form,
        external_sqrt=external_sqrt,
        set_external_threads=set_external_threads,
    )


def _native_sgd_(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    *,
    out: Tensor | None,
    lr: float,
    momentum_factor: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
    first_step: bool,
    grad_scale: float,
) -> None:
    _native.sgd(
        param.data_ptr(),
        grad.data_ptr(),
        _code(grad),
        0 if momentum is None else momentum.data_ptr(),
        *_out_arguments(out),
        param.numel(),
        grad_scale=grad_scale,
        maximize=maximize,
        penalty=weight_decay,
        momentum_factor=momentum_factor,
        dampening=dampening,
        nesterov=nesterov,
        first_step=first_step,
        lr=lr,
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
    ours, theirs = state.clone(), state.clone()
    for tensors, adam, sgd in ((ours, adam_, sgd_), (theirs, reference.adam_, reference.sgd_)):
        param, exp_avg, exp_avg_sq, momentum = tensors.unbind()
        adam(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            out=None,
            step=7,
            lr=1e-2,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.1,
            decoupled=True,
            maximize=False,
            grad_scale=0.7,
        )
        sgd(
            param,
            grad,
            momentum,
            out=None,
            lr=1e-2,
            momentum_factor=0.9,
            dampening=0.1,
            nesterov=True,
            weight_decay=0.1,
            maximize=False,
            first_step=False,
            grad_scale=0.7,
        )
    return torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
