"""Adam on state that is kept in a form of its own: decoded, updated and encoded in one pass.

As in `kernels.api`, the native module computes it if it was built, else torch's operations, with the same results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ssd._extension import _native
from lightning_ssd.kernels import bits, reference
from lightning_ssd.kernels.api import adam_arguments, check, is_native, require_step
from lightning_ssd.kernels.options import AdamOptions


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
    numel = high.numel()
    for name, tensor, dtype in (
        ("high", high, torch.bfloat16),
        ("low", low, torch.uint16),
        ("exp_avg", exp_avg, torch.float32),
        ("exp_avg_sq", exp_avg_sq, torch.float32),
    ):
        check(name, tensor, numel, dtype)
    check("grad", grad, numel)
    require_step(options)
    if not is_native():
        _split_adam(high, low, grad, exp_avg, exp_avg_sq, options)
        return
    places = {"high": high.data_ptr(), "low": low.data_ptr()}
    _native.adam(**adam_arguments(grad, options), **places, **_moments(exp_avg, exp_avg_sq))


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
