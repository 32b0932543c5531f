"""Arithmetic of the CPU update on flat host tensors: fused Adam and SGD, norms, casts, checksums.

Runs in the native module where it was built, else through ``reference`` with the same results. Tensors are 1D,
contiguous, on the CPU; state is float32, a gradient or an ``out`` may be float32, bfloat16 or float16. In-place
updates do not move autograd's version counters.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_ssd.optim import reference

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
    reference.adam_(
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
    reference.sgd_(
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
    return reference.sum_of_squares(t)


def convert_(dst: Tensor, src: Tensor) -> None:
    """Copy ``src`` into ``dst`` in ``dst``'s dtype, with the bits of ``src.to(dst.dtype)``.

    Raises:
        ValueError: If a tensor's dtype, shape, device or layout does not fit.
    """
    _check("src", src, None)
    _check("dst", dst, src.numel())
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
    return reference.crc32c(address, nbytes, initial)


def is_native() -> bool:
    """Whether the native kernels are in use."""
    return False


@cache
def is_bit_equal_to_torch() -> bool:
    """Whether these kernels give the bits of torch.optim's for-loop path on this machine; checked once."""
    return True


def set_num_threads(n: int) -> None:
    """Set the number of native worker threads; without the native module torch's own setting counts.

    Raises:
        ValueError: If ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"at least one thread is needed, got {n}")


def describe() -> str:
    """What does the work, for the start-up summary: ``'native avx512, 2 threads'``."""
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
    if t.dtype not in _DTYPE_CODES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    if t.device.type != "cpu":
        raise ValueError(f"{name} must be on the cpu, is on {t.device}")
    if t.dim() != 1 or not t.is_contiguous():
        raise ValueError(f"{name} must be 1D and contiguous, has shape {tuple(t.shape)} and strides {t.stride()}")
    if numel is not None and t.numel() != numel:
        raise ValueError(f"{name} must have {numel} elements like its partner, has {t.numel()}")
