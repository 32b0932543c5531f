"""Adam on state that is kept in a form of its own: decoded, updated and encoded in one pass.

As in `kernels.api`, the native module computes it if it was built, else torch's operations, with the same results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ssd._extension import _native
from lightning_ssd.kernels import bits, reference
from lightning_ssd.kernels.api import adam_arguments, check, is_native, require_step
from lightning_ssd.kernels.options import AdamOptions


class Counter(NamedTuple):
    """Which random bits an element is rounded by: those of a hash of the key and the element's number.

    Attributes:
        key: 64 bits, of the parameter and the step.
        first: Number, in the parameter, of the first element of a piece.
    """

    key: int
    first: int


def split_adam_(
    high: Tensor, low: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, options: AdamOptions
) -> None:
    """One Adam or AdamW step on a master in two halves, in place; see `bits.split_encode`.

    Args:
        high: bfloat16 parameter, the master rounded.
        low: uint16 lower half of the master.
        grad: Gradient; widened exactly to float32, not changed.
        exp_avg: float32 first moment.
        exp_avg_sq: float32 second moment; its sign is a part of the master.
        options: Settings of the step.

    Raises:
        ValueError: A tensor's dtype, shape, device or layout does not fit, or the step is below 1.
    """
    _check(options, grad, high, low, exp_avg, exp_avg_sq, torch.float32)
    if not is_native():
        _split_adam(high, low, grad, exp_avg, exp_avg_sq, options)
        return
    places = {"high": high.data_ptr(), "low": low.data_ptr()}
    _native.adam(**adam_arguments(grad, options), **places, **_moments(exp_avg, exp_avg_sq))


def narrow_adam_(
    param: Tensor,
    low: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    options: AdamOptions,
    counter: Counter,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> None:
    """One Adam or AdamW step with moments in bfloat16 or in 8 bits, in place.

    The first moment is rounded to nearest, the second by chance, in proportion to the distance: to nearest it would
    stand still where a step changes it by less than half of a unit in its last place. It never becomes zero.

    Args:
        param: float32 values; with ``low`` the bfloat16 parameter, a master rounded.
        low: uint16 lower half of the master; [Note: nudged split] in ``native/codec/codec.hpp``.
        grad: Gradient; widened exactly to float32, not changed.
        exp_avg: First moment, bfloat16; with ``scales`` codes of `bits.signed_log8_encode`.
        exp_avg_sq: Second moment, bfloat16; with ``scales`` codes of `bits.log8_encode`.
        options: Settings of the step.
        counter: Which random bits are used.
        scales: float32, the largest value of each block of the first and of the second moment.
        out: Receives the updated values in its own dtype; if that is bfloat16, ``param`` is nudged as with ``low``.

    Raises:
        ValueError: A tensor's dtype, shape, device or layout does not fit, or the step is below 1.
    """
    _check(options, grad, param, low, exp_avg, exp_avg_sq, torch.bfloat16 if scales is None else torch.uint8)
    for scale in scales or ():
        check("scale", scale, -(-param.numel() // bits.BLOCK_NUMEL), torch.float32)
    if out is not None:
        check("out", out, param.numel())
    if not is_native():
        _narrow_adam(param, low, grad, exp_avg, exp_avg_sq, options, counter, scales, out)
        return
    places = {"param": param.data_ptr()} if low is None else {"high": param.data_ptr(), "low": low.data_ptr()}
    form = {"form": _native.MomentForm.bfloat16, "key": counter.key, "first": counter.first}
    if scales is not None:
        form["form"] = _native.MomentForm.log8
        form |= {"exp_avg_scale": scales[0].data_ptr(), "exp_avg_sq_scale": scales[1].data_ptr()}
    _native.adam(**adam_arguments(grad, options, out), **_moments(exp_avg, exp_avg_sq) | places, **form)


def _check(
    options: AdamOptions,
    grad: Tensor,
    param: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    moments: torch.dtype,
) -> None:
    numel = param.numel()
    check("param", param, numel, torch.float32 if low is None else torch.bfloat16)
    if low is not None:
        check("low", low, numel, torch.uint16)
    check("exp_avg", exp_avg, numel, moments)
    check("exp_avg_sq", exp_avg_sq, numel, moments)
    check("grad", grad, numel)
    require_step(options)


@torch.no_grad()
def _narrow_adam(
    param: Tensor,
    low: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    options: AdamOptions,
    counter: Counter,
    scales: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
) -> None:
    master = param if low is None else bits.nudged_decode(param, low)
    if scales is None:
        first, second = exp_avg.float(), exp_avg_sq.float()
    else:
        first, second = bits.signed_log8_decode(exp_avg, scales[0]), bits.log8_decode(exp_avg_sq, scales[1])
    reference.adam_(master, grad, first, second, options, out=out)
    if scales is None:
        new = {exp_avg: first.bfloat16(), exp_avg_sq: bits.positive_bfloat16(second, counter)}
    else:
        new = dict(zip((exp_avg, scales[0]), bits.signed_log8_encode(first), strict=True))
        new |= dict(zip((exp_avg_sq, scales[1]), bits.log8_encode(second, counter), strict=True))
    if low is not None:
        new |= dict(zip((param, low), bits.nudged_encode(master), strict=True))
    elif out is not None and out.dtype == torch.bfloat16:
        new[param] = bits.nudged_decode(*bits.nudged_encode(master))
    for tensor, values in new.items():
        tensor.copy_(values)


def _moments(exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, int]:
    return {"exp_avg": exp_avg.data_ptr(), "exp_avg_sq": exp_avg_sq.data_ptr(), "numel": exp_avg.numel(), "param": 0}


@torch.no_grad()
def _split_adam(
    high: Tensor, low: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, options: AdamOptions
) -> None:
    master, second = bits.split_decode(high, low, exp_avg_sq), bits.without_sign(exp_avg_sq)
    reference.adam_(master, grad, exp_avg, second, options, out=None)
    for tensor, new in zip((high, low, exp_avg_sq), bits.split_encode(master, second), strict=True):
        tensor.copy_(new)
