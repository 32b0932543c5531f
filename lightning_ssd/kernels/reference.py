"""The slow, obvious update, sum, conversion and CRC32C; tests/kernels compares every native kernel with it.

Each update runs the torch operations of ``torch.optim``'s for-loop path (``foreach=False, fused=False``) in the same
order, so equal inputs give the same bits. Arguments are not checked here but in `kernels.api`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ssd.kernels.options import AdamOptions, SGDOptions

_CRC32C_POLYNOMIAL = 0x82F63B78
_LANES = 4096
"""A buffer is cut into so many lanes, whose CRCs advance together: one numpy operation for a byte of each lane."""


@torch.no_grad()
def adam_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, options: AdamOptions, *, out: Tensor | None
) -> None:
    """One Adam or AdamW step; see `kernels.api.adam_`."""
    o, (beta1, beta2) = options, options.betas
    grad = _widened(grad, o.grad_scale, o.maximize)
    if o.weight_decay != 0 and o.decoupled:
        param.mul_(1 - o.lr * o.weight_decay)
    elif o.weight_decay != 0:
        grad = grad.add(param, alpha=o.weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = o.lr / (1 - beta1**o.step)
    denom = (exp_avg_sq.sqrt() / (1 - beta2**o.step) ** 0.5).add_(o.eps)
    param.addcdiv_(exp_avg, denom, value=-step_size)
    if out is not None:
        out.copy_(param)


@torch.no_grad()
def sgd_(param: Tensor, grad: Tensor, momentum: Tensor | None, options: SGDOptions, *, out: Tensor | None) -> None:
    """One SGD step; see `kernels.api.sgd_`. The first makes ``momentum`` a copy of the gradient, as torch does."""
    o = options
    grad = _widened(grad, o.grad_scale, o.maximize)
    if o.weight_decay != 0:
        grad = grad.add(param, alpha=o.weight_decay)
    if momentum is not None and o.momentum_factor != 0:
        if o.first_step:
            momentum.copy_(grad)
        else:
            momentum.mul_(o.momentum_factor).add_(grad, alpha=1 - o.dampening)
        grad = grad.add(momentum, alpha=o.momentum_factor) if o.nesterov else momentum
    param.add_(grad, alpha=-o.lr)
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
    """The gradient in float32, scaled, and with its sign changed if the step goes along it."""
    grad = grad.float()
    if grad_scale != 1.0:
        grad = grad * grad_scale
    return -grad if maximize else grad


@cache
def _byte_table() -> np.ndarray[Any, np.dtype[np.uint32]]:
    """CRC register after each of the 256 bytes."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_CRC32C_POLYNOMIAL), table >> 1)
    return table.astype(np.uint32)


def _advance(crc: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """CRC registers ``crc``, one per row of ``rows``, after the bytes of its row."""
    table = _byte_table()
    for column in range(rows.shape[1]):
        crc = table[(crc ^ rows[:, column]) & 0xFF] ^ (crc >> np.uint32(8))
    return crc


def _join(lanes: np.ndarray[Any, Any], lane_nbytes: int) -> np.ndarray[Any, Any]:
    """CRC register after all lanes. The CRC is linear: a lane's register is shifted past the bytes that follow it."""
    shift = _shift_matrix(lane_nbytes)
    while len(lanes) > 1:
        lanes = _apply(shift, lanes[0::2]) ^ lanes[1::2]
        shift = _apply(shift, shift)
    return lanes


def _shift_matrix(nbytes: int) -> np.ndarray[Any, Any]:
    """Columns of the matrix over GF(2) that shifts a register past ``nbytes`` zero bytes."""
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
    """Products over GF(2) of a matrix, given by its columns, and each vector."""
    result: np.ndarray[Any, Any] = np.zeros_like(vectors)
    for bit in range(32):
        result ^= np.where((vectors >> np.uint32(bit)) & 1, matrix[bit], np.uint32(0))
    return result
