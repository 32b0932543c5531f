"""Adam on state in a form of its own: equal at every level to torch's operations, and second moments that track."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_ssd.codec.forms import _key
from lightning_ssd.kernels import api, bits, stored
from lightning_ssd.kernels.options import AdamOptions
from lightning_ssd.kernels.stored import Counter, narrow_adam_, split_adam_

SPECIAL = (
    *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00008000, 0x00018000, 0x00007FFF, 0x7F7FFFFF),
    *(0x7F7F7FFF, 0x7F7F8000, 0x7F7F8001, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0xBF818000),
)
"""Zeros, denormals, ties of both kinds, words that round to infinity, infinities."""


@pytest.fixture(params=[*(api._native.kernel_levels() if api.is_native() else []), None])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each level of the native kernels, and torch's operations."""
    if request.param is None:
        monkeypatch.setattr(stored, "is_native", lambda: False)
        monkeypatch.setattr(api, "is_native", lambda: False)
        yield
        return
    before = api._native.kernel_level()
    api._native.set_kernel_level(request.param)
    yield
    api._native.set_kernel_level(before)


def masters(num: int) -> Tensor:
    """Numbers of which every fourth is a tie, with the special ones at the front."""
    words = torch.randn(num, generator=torch.Generator().manual_seed(2)).view(torch.int32)
    words[::4] = (words[::4] & ~0xFFFF) | 0x8000
    front = torch.tensor([word - (1 << 32) if word >> 31 else word for word in SPECIAL], dtype=torch.int32)
    words[: len(front)] = front
    return words.view(torch.float32)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit; NaNs are one."""
    width = {4: torch.int32, 2: torch.int16}[a.element_size()]
    is_nan = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros(a.shape, dtype=torch.bool)
    return bool((is_nan | (a.view(width) == b.view(width))).all())


def settings(step: int, beta2: float = 0.999) -> AdamOptions:
    return AdamOptions(step, 2**-10, (0.9, beta2), eps=1e-8, weight_decay=0.1, decoupled=True)


def grad_of(step: int, num: int) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(step)).bfloat16()


@pytest.mark.parametrize("num", [1, len(SPECIAL), 1023, 40_007])
def test_a_master_in_two_halves_is_a_master(level: None, num: int) -> None:
    num = max(num, len(SPECIAL)) if num > 1 else num
    master = masters(max(num, len(SPECIAL)))[:num]
    first, second = torch.randn(num) / 64, torch.rand(num) / 64
    high, low, tied = bits.split_encode(master, second)
    assert same(bits.split_decode(high, low, tied), master)
    ours, param = first.clone(), torch.empty(num, dtype=torch.bfloat16)
    for step in range(1, 5):
        split_adam_(high, low, grad_of(step, num), ours, tied, settings(step))
        api.adam_(master, grad_of(step, num), first, second, settings(step), out=param)
    assert same(bits.split_decode(high, low, tied), master)
    assert same(high, param)
    assert same(ours, first)
    assert same(bits.without_sign(tied), second)


@pytest.mark.parametrize("halves", [True, False])
def test_narrow_moments_are_torchs_operations(level: None, halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut anywhere, with a master in two halves or whole: the bits of the slow version over all of it."""
    num = 30_011
    high, low = bits.nudged_encode(masters(num))
    expected = [high, low, torch.zeros(num).bfloat16(), torch.zeros(num).bfloat16()]
    ours = [tensor.clone() for tensor in expected]
    whole = bits.nudged_decode(high, low)
    for step in range(1, 4):
        grad = grad_of(step, num)
        grad[::3] *= 1e-12
        key = _key("some.weight", step)
        a, b, first, second = expected
        stored._narrow_adam(a, b, grad, first, second, settings(step), Counter(key, 7), None)
        for begin, end in ((0, 1000), (1000, 1001), (1001, num)):
            x, y, first, second = (tensor[begin:end] for tensor in ours)
            param, out = (x, None) if halves else (whole[begin:end], x)
            lower = y if halves else None
            at = Counter(key, 7 + begin)
            narrow_adam_(param, lower, grad[begin:end], first, second, settings(step), at, out=out)
    if not halves:
        ours[1] = bits.nudged_encode(whole)[1]
        assert same(whole, bits.nudged_decode(expected[0], expected[1]))
    assert all(map(same, ours, expected))
    assert bool((ours[3][len(SPECIAL) :] > 0).all())


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_second_moments_track_a_tenfold_fall(beta2: float) -> None:
    """Rounded to nearest they would stand still at 0.999 and be 7 times too large."""
    num = 4096
    param, first, second = torch.zeros(num), torch.zeros(num).bfloat16(), torch.zeros(num).bfloat16()
    exact, generator = torch.zeros(num), torch.Generator().manual_seed(1)
    for step in range(1, 5001):
        grad = torch.randn(num, generator=generator)
        if step > 1000:
            grad[::2] *= 0.1
        narrow_adam_(param, None, grad, first, second, settings(step, beta2), Counter(_key("w", step), 0))
        exact.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    ratio = (second.float() / exact).sqrt()
    assert ratio.mean() == pytest.approx(1, abs=0.01)
    assert ((ratio > 0.9) & (ratio < 1.1)).float().mean() > 0.95
    assert bool((second > 0).all())
