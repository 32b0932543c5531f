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


def narrow(form: str, num: int) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
    """Zero moments, and the scales of those in 8 bits."""
    if form == "bf16":
        return [torch.zeros(num).bfloat16() for _ in range(2)], None
    num_blocks = -(-num // bits.BLOCK_NUMEL)
    return [torch.zeros(num, dtype=torch.uint8) for _ in range(2)], (torch.zeros(num_blocks), torch.zeros(num_blocks))


def values(moments: list[Tensor], scales: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    if scales is None:
        return [moment.float() for moment in moments]
    return [bits.signed_log8_decode(moments[0], scales[0]), bits.log8_decode(moments[1], scales[1])]


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("halves", [True, False])
def test_narrow_moments_are_torchs_operations(level: None, halves: bool, form: str) -> None:
    """Cut at blocks, with a master in two halves or whole: the bits of the slow version over all of it."""
    num, exact = 30_011, torch.zeros(30_011)
    high, low = bits.nudged_encode(masters(num))
    ours = (high.clone(), low.clone(), *narrow(form, num))
    slow = (high, low, *narrow(form, num))
    whole = bits.nudged_decode(high, low)
    for step in range(1, 4):
        grad = grad_of(step, num)
        grad[::3] *= 1e-12
        exact.mul_(0.999).addcmul_(grad.float(), grad.float(), value=0.001)
        key = _key("some.weight", step)
        stored._narrow_adam(high, low, grad, *slow[2], settings(step), Counter(key, 0), slow[3], None)
        for begin, end in ((0, 1024), (1024, 1152), (1152, num)):
            x, y, first, second = (tensor[begin:end] for tensor in (*ours[:2], *ours[2]))
            blocks = slice(begin // bits.BLOCK_NUMEL, -(-end // bits.BLOCK_NUMEL))
            scales = None if ours[3] is None else (ours[3][0][blocks], ours[3][1][blocks])
            param, lower, out = (x, y, None) if halves else (whole[begin:end], None, x)
            at = Counter(key, begin)
            narrow_adam_(param, lower, grad[begin:end], first, second, settings(step), at, scales=scales, out=out)
    if halves:
        whole = bits.nudged_decode(*ours[:2])
    assert same(whole, bits.nudged_decode(high, low))
    assert same(ours[0], high)
    found = values(*ours[2:])
    assert all(map(same, found, values(*slow[2:])))
    assert not ((found[1] == 0) & (exact > 0)).any()


def test_eight_bits_keep_what_they_keep() -> None:
    """Zeros, a block with one huge value, denormals, a short last block: decoded values are encoded to themselves."""
    generator = torch.Generator().manual_seed(4)
    blocks = [torch.zeros(128), torch.randn(128, generator=generator) * 1e-20, torch.randn(128, generator=generator)]
    blocks += [torch.full((128,), 1e-42), torch.randn(37, generator=generator) * 1e30]
    blocks[2][5] = 3e38
    flat = torch.cat(blocks)
    first = bits.signed_log8_decode(*bits.signed_log8_encode(flat))
    second = bits.log8_decode(*bits.log8_encode(flat.abs()))
    assert torch.equal(first.sign(), torch.where(first == 0, 0.0, flat.sign()))
    assert not ((second == 0) & (flat != 0)).any()
    for begin, end in ((128, 256), (384, 549)):
        torch.testing.assert_close(
            first[begin:end], flat[begin:end], rtol=1 / 15, atol=float(flat[begin:end].abs().max()) / 2**15
        )
    torch.testing.assert_close(second[128:256], flat[128:256].abs(), rtol=1 / 15, atol=1e-29)
    assert float(first[261]) == float(second[261]) == float(flat[261])
    assert same(bits.signed_log8_decode(*bits.signed_log8_encode(first)), first)
    assert same(bits.log8_decode(*bits.log8_encode(second)), second)


@pytest.mark.parametrize(("form", "low", "high", "share"), [("bf16", 0.9, 1.1, 0.95), ("int8", 0.7, 1.4, 0.94)])
@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_second_moments_track_a_tenfold_fall(beta2: float, form: str, low: float, high: float, share: float) -> None:
    """Rounded to nearest they would stand still at 0.999 and be 7 times too large."""
    num = 4096
    param, (moments, scales) = torch.zeros(num), narrow(form, num)
    exact, generator = torch.zeros(num), torch.Generator().manual_seed(1)
    for step in range(1, 5001):
        grad = torch.randn(num, generator=generator)
        if step > 1000:
            grad[::2] *= 0.1
        at = Counter(_key("w", step), 0)
        narrow_adam_(param, None, grad, *moments, settings(step, beta2), at, scales=scales)
        exact.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    ratio = (values(moments, scales)[1] / exact).sqrt()
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    assert ((ratio > low) & (ratio < high)).float().mean() > share
    assert bool((ratio > 0).all())


@pytest.mark.soak
@pytest.mark.parametrize("part", range(16))
def test_every_word_survives_two_halves(part: int) -> None:
    """All 2**32 words, in 16 parts: encoded, through a step that changes nothing, and decoded, at each level."""
    num = 1 << 22
    zero, nothing = torch.zeros(num), AdamOptions(1, 0.0, (0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=True)
    levels = api._native.kernel_levels() if api.is_native() else []
    before = api._native.kernel_level() if levels else ""
    begin = (part << 28) - (1 << 31)
    for first in range(begin, begin + (1 << 28), num):
        master = torch.arange(first, first + num, dtype=torch.int32).view(torch.float32)
        halves = bits.split_encode(master, zero)
        assert same(bits.split_decode(*halves), master), first
        for name in levels:
            api._native.set_kernel_level(name)
            found = [tensor.clone() for tensor in halves]
            split_adam_(found[0], found[1], zero, torch.zeros(num), found[2], nothing)
            assert all(map(same, found, halves)), (name, first)
    if levels:
        api._native.set_kernel_level(before)
