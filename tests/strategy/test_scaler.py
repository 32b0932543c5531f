"""A loss scaler of a GPU meets gradients on the host."""

from __future__ import annotations

import torch

from lightning_ssd.strategy.precision import unscale_on_host


def test_gradients_are_unscaled_on_the_host_once() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param], fused=True)  # would leave unscaling to its kernel
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    param.grad = torch.tensor([8.0, 16.0, 24.0])
    seen = []
    unscale = scaler._unscale_grads_
    scaler._unscale_grads_ = lambda *a: (seen.append([t.device.type for t in a[1:3]]), unscale(*a))[1]
    wrapped = vars(scaler).pop("_unscale_grads_")
    scaler.__class__ = type("Scaler", (torch.amp.GradScaler,), {"_unscale_grads_": staticmethod(wrapped)})
    for _ in range(2):
        unscale_on_host(scaler, optimizer)
    assert optimizer._step_supports_amp_scaling is False
    scaler.unscale_(optimizer)
    assert seen == [["cpu", "cpu"]]
    assert param.grad.tolist() == [1.0, 2.0, 3.0]
