"""Checksums that a device makes; here the CPU stands for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ssd.units import fingerprint
from lightning_ssd.units.fingerprint import DeviceSums, _sum

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.complex128]


def sums(*tensors: Tensor) -> DeviceSums:
    return DeviceSums(torch.stack([_sum(tensor) for tensor in tensors]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_and_an_exchange_show(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(fingerprint, "_CHUNK_NUMEL", 100)
    tensor = (torch.randn(30, 17, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    other = torch.arange(3)
    assert sums(tensor, other) == sums(tensor.clone(), other)
    assert sums(tensor, other) != sums(other, tensor)
    flat = tensor.view(-1)
    for at in (0, 99, 100, 509):
        changed = flat.clone()
        changed[at] = ~changed[at] if dtype == torch.bool else changed[at] + 1
        assert sums(changed) != sums(flat)
        exchanged = flat.clone()
        exchanged[[at, 50]] = exchanged[[50, at]]
        assert (sums(exchanged) == sums(flat)) == bool(flat[at] == flat[50])


def test_the_order_of_memory_counts() -> None:
    tensor = torch.randn(4, 6).t()
    assert sums(tensor) == sums(tensor.t().contiguous())
