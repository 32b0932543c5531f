"""The slow, obvious update, sum, conversion and CRC32C; tests/optim holds every native kernel to it.

Each update runs the very torch operations, in the very order, of ``torch.optim``'s for-loop path
(``foreach=False, fused=False``), so from equal inputs it gives the same bits. Checks nothing; ``kernels`` does.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CRC32C_POLYNOMIAL = 0x82F63B78
_LANES = 4096
"""Stretches of a buffer whose CRCs advance together, one numpy operation per byte column."""


@torch.no_grad()
def adam_(
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
    """One Adam or AdamW step on flat float32 state; ``step`` is 1 for the first."""
    beta1, beta2 = betas
    grad = _widened(grad, grad_scale, maximize)
    if weight_decay != 0 and decoupled:
        param.mul_(1 - lr * weight_decay)
    elif weight_decay != 0:
        grad = grad.add(param, alpha=weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = lr / (1 - beta1**step)
    denom = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denom, value=-step_size)
    if out is not None:
        out.copy_(param)


@torch.no_grad()
def sgd_(
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
    """One SGD step on flat float32 state; the first makes ``momentum`` a copy of the gradient, as torch does."""
    grad = _widened(grad, grad_scale, maximize)
    if weight_decay != 0:
        grad = grad.add(param, alpha=weight_decay)
    if momentum is not None and momentum_factor != 0:
        if first_step:
            momentum.copy_(grad)
        else:
            momentum.mul_(momentum_factor).add_(grad, alpha=1 - dampening)
        grad = grad.add(momentum, alpha=momentum_factor) if nesterov else momentum
    param.add_(grad, alpha=-lr)
    if out is not None:
        out.copy_(param)


def sum_of_squares(t: Tensor) -> tuple[float, bool]:
    """Sum of squares in float64, and whether every element is finite."""
    wide = t.detach().double()
    return float(torch.dot(wide, wide)), bool(torch.isfinite(wide).all())


def convert_(dst: Tensor, src: Tensor) -> None:
    """Copy ``src`` into ``dst``, rounding to nearest even where ``dst`` is narrower."""
    with torch.no_grad():
        dst.copy_(src)


def crc32c(address: int, nbytes: int, initial: int) -> int:
    """CRC32C of ``nbytes`` bytes at ``address``, continuing from the CRC ``initial`` of the bytes before."""
    if nbytes == 0:
        return initial
    data = np.frombuffer(memoryview((ctypes.c_ubyte * nbytes).from_address(address)), dtype=np.uint8)
    lane_nbytes = nbytes // _LANES
    crc = np.array([initial ^ 0xFFFFFFFF], dtype=np.uint32)
    if lane_nbytes:
        lanes = np.zeros(_LANES, dtype=np.uint32)
        lanes[0] = crc[0]
        lanes = _advance(lanes, data[: lane_nbytes * _LANES].reshape(_LANES, lane_nbytes))
        crc = _join(lanes, lane_nbytes)
    crc = _advance(crc, data[lane_nbytes * _LANES :].reshape(1, -1))
    return int(crc[0]) ^ 0xFFFFFFFF


def _widened(grad: Tensor, grad_scale: float, maximize: bool) -> Tensor:
    grad = grad.float()
    if grad_scale != 1.0:
        grad = grad * grad_scale
    return -grad if maximize else grad


@cache
def _byte_table() -> np.ndarray[Any, np.dtype[np.uint32]]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_CRC32C_POLYNOMIAL), table >> 1)
    return table.astype(np.uint32)


def _advance(crc: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Registers ``crc``, one per row, after each row's bytes."""
    table = _byte_table()
    for column in range(rows.shape[1]):
        crc = table[(crc ^ rows[:, column]) & 0xFF] ^ (crc >> np.uint32(8))
    return crc


def _join(lanes: np.ndarray[Any, Any], lane_nbytes: int) -> np.ndarray[Any, Any]:
    """Register after all lanes: the CRC is linear, so a lane's register is moved past the bytes that follow it."""
    shift = _shift_matrix(lane_nbytes)
    while len(lanes) > 1:
        lanes = _apply(shift, lanes[0::2]) ^ lanes[1::2]
        shift = _apply(shift, shift)
    return lanes


def _shift_matrix(nbytes: int) -> np.ndarray[Any, Any]:
    """Columns of the matrix over GF(2) that moves a register past ``nbytes`` zero bytes."""
    power: np.ndarray[Any, Any] = np.uint32(1) << np.arange(32, dtype=np.uint32)
    result = power
    power = _advance(power, np.zeros((32, 1), dtype=np.uint8))
    while nbytes:
        if nbytes & 1:
            result = _apply(power, result)
        power = _apply(power, power)
        nbytes >>= 1
    return result


def _apply(matrix: np.ndarray[Any, Any], vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = np.zeros_like(vectors)
    for bit in range(32):
        result ^= np.where((vectors >> np.uint32(bit)) & 1, matrix[bit], np.uint32(0))
    return result
