"""The settings of one step of each rule, as its kernels take them."""

from __future__ import annotations

from typing import NamedTuple


class AdamOptions(NamedTuple):
    """Settings of one Adam or AdamW step.

    Attributes:
        step: Number of this step; 1 for the first.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the denominator.
        weight_decay: Decay of the weights, or factor of the L2 penalty if not ``decoupled``.
        decoupled: AdamW's weight decay instead of Adam's L2 penalty.
        maximize: Step along the gradient instead of against it.
        grad_scale: Factor on the gradient, applied first and rounded to float32; 1.0 does nothing.
    """

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool = False
    grad_scale: float = 1.0


class SGDOptions(NamedTuple):
    """Settings of one SGD step.

    Attributes:
        lr: Learning rate.
        momentum_factor: Decay of the momentum buffer; 0 is plain SGD.
        dampening: One minus the gradient's weight in the buffer.
        nesterov: Use Nesterov momentum.
        weight_decay: Factor of the L2 penalty.
        first_step: The momentum buffer holds nothing yet and becomes a copy of the gradient.
        maximize: Step along the gradient instead of against it.
        grad_scale: Factor on the gradient, applied first and rounded to float32; 1.0 does nothing.
    """

    lr: float
    momentum_factor: float
    dampening: float
    nesterov: bool
    weight_decay: float
    first_step: bool
    maximize: bool = False
    grad_scale: float = 1.0
