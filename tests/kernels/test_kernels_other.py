"""Casts, sums, checksums and refusals of the kernels, on every level of this CPU and without the native module."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ssd.kernels import api as kernels
from lightning_ssd.kernels import reference
from lightning_ssd.kernels.options import AdamOptions, SGDOptions

NATIVE = kernels._native
LEVELS = NATIVE.kernel_levels() if NATIVE is not None else []
CRC32CS = NATIVE.crc32c_names() if NATIVE is not None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 16_384


@pytest.fixture(params=["reference", *LEVELS])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once on each level of this CPU, and once without the native module."""
    if request.param == "reference":
        monkeypatch.setattr(kernels, "_native", None)
        yield request.param
        return
    before = NATIVE.kernel_level()
    NATIVE.set_kernel_level(request.param)
    yield request.param
    NATIVE.set_kernel_level(before)


def every_kind_of_number(dtype: torch.dtype) -> Tensor:
    """All 65,536 numbers of a 16-bit type; of float32 every exponent with mantissas around the roundings of both."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    mantissas = [i * 2**k + j for k in (12, 13, 15, 16) for i in range(4) for j in (-1, 0, 1)]
    edges = torch.tensor(mantissas, dtype=torch.int64) + torch.arange(512).unsqueeze(1) * 2**23
    random = torch.randint(0, 2**32, (100_003,), generator=generator)
    together = torch.cat([edges.flatten(), random]) % 2**32
    return (together - 2**32 * (together >= 2**31)).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize(("src_dtype", "dst_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_casts_have_the_bits_of_torch(level: str, src_dtype: torch.dtype, dst_dtype: torch.dtype) -> None:
    src = every_kind_of_number(src_dtype)
    for piece in (src, src[5:], src[3:20], src[:1], src[:0]):
        dst = torch.zeros(piece.numel(), dtype=dst_dtype)
        kernels.convert_(dst, piece)
        expected = piece.to(dst_dtype)
        nan = expected.isnan()
        integers = torch.int32 if dst_dtype == torch.float32 else torch.int16
        assert torch.equal(dst.isnan(), nan)
        assert torch.equal(dst.view(integers)[~nan], expected.view(integers)[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 31, 33, 1000, BLOCK + 1, 5 * BLOCK + 77])
def test_sum_of_squares(level: str, dtype: torch.dtype, numel: int) -> None:
    t = torch.randn(numel + 1, generator=torch.Generator().manual_seed(numel)).to(dtype)[1:]
    total, is_finite = kernels.sum_of_squares(t)
    assert is_finite
    assert total == pytest.approx(float(np.square(t.double().numpy()).sum()), rel=1e-13)
    if level != "reference":
        NATIVE.set_kernel_level("scalar")
        assert kernels.sum_of_squares(t)[0] == total
    for index in {0, numel // 2, numel - 1} if numel else ():
        for value in (torch.nan, torch.inf, -torch.inf):
            spoiled = t.clone()
            spoiled[index] = value
            assert not kernels.sum_of_squares(spoiled)[1]
    largest = torch.full((numel,), torch.finfo(dtype).max, dtype=dtype)
    assert kernels.sum_of_squares(largest)[1]


@pytest.fixture(params=["reference", "native", *CRC32CS])
def crc32c(request: pytest.FixtureRequest) -> Callable[..., int]:
    """The checksum over bytes."""
    if request.param == "native" and NATIVE is None:
        pytest.skip("needs the native module")
    functions = {"reference": reference.crc32c, "native": kernels.crc32c}
    function = functions.get(request.param) or functools.partial(NATIVE.crc32c_by, request.param)

    def checksum(data: bytes, initial: int = 0, start: int = 0) -> int:
        array = np.frombuffer(data, dtype=np.uint8)
        return function(array.ctypes.data + start, len(data) - start, initial)

    return checksum


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # this and the next three: RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_known_answers(crc32c: Callable[..., int], data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nbytes=st.integers(0, 30_000), cut=st.integers(0, 30_000), start=st.integers(0, 9), seed=st.integers(0, 99))
def test_crc32c_continues(crc32c: Callable[..., int], nbytes: int, cut: int, start: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, nbytes + start, dtype=np.uint8).tobytes()
    cut = start + cut % (nbytes + 1)
    whole = crc32c(data, 0, start)
    assert crc32c(data[cut:], crc32c(data[:cut], 0, start)) == whole
    assert whole == _one_byte_at_a_time(data[start:])


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 4097, 40_000])
def test_crc32c_of_each_piece(level: str, nbytes: int) -> None:
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
    pieces = [data[begin : begin + 4096].tobytes() for begin in range(0, nbytes, 4096)]
    address = data.ctypes.data
    assert kernels.crc32c_each(address, nbytes, 4096) == [_one_byte_at_a_time(piece) for piece in pieces]


def _one_byte_at_a_time(data: bytes) -> int:
    table = reference._byte_table().tolist()
    state = 0xFFFFFFFF
    for byte in data:
        state = table[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def test_calls_from_several_threads_do_not_disturb_each_other(level: str) -> None:
    t = torch.randn(20 * BLOCK, generator=torch.Generator().manual_seed(1))
    expected = kernels.sum_of_squares(t)
    wrong: list[tuple[float, bool]] = []

    def work() -> None:
        for _ in range(20):
            result = kernels.sum_of_squares(t)
            if result != expected:
                wrong.append(result)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _adam(step: int = 1, **changed: Tensor) -> None:
    tensors = {name: torch.ones(8) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    options = AdamOptions(step, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=True)
    kernels.adam_(**{**tensors, **changed}, options=options)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"param": torch.ones(8, dtype=torch.bfloat16)}, "param must be float32"),
        ({"exp_avg": torch.ones(8, dtype=torch.float64)}, "exp_avg must be float32"),
        ({"grad": torch.ones(8, dtype=torch.float64)}, "grad must be float32, bfloat16 or float16"),
        ({"grad": torch.ones(7)}, "grad must have 8 elements"),
        ({"grad": torch.ones(2, 4)}, "1D and contiguous"),
        ({"exp_avg_sq": torch.ones(16)[::2]}, "1D and contiguous"),
        ({"out": torch.ones(9)}, "out must have 8 elements"),
        ({"out": torch.ones(8, device="meta")}, "on the cpu"),
        ({"step": 0}, "counts from 1"),
    ],
)
def test_adam_refuses_what_it_cannot_do(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _adam(**changed)


def test_other_refusals() -> None:
    t = torch.ones(4)
    options = SGDOptions(0.1, 0.9, dampening=0.0, nesterov=False, weight_decay=0.0, first_step=True)
    with pytest.raises(ValueError, match="is missing"):
        kernels.sgd_(t, t, None, options)
    with pytest.raises(ValueError, match="was given"):
        kernels.sgd_(t, t, t, options._replace(momentum_factor=0.0))
    with pytest.raises(ValueError, match="dst must have 4 elements"):
        kernels.convert_(torch.ones(3), t)
    with pytest.raises(ValueError, match="cannot checksum -1 bytes"):
        kernels.crc32c(t.data_ptr(), -1)
    with pytest.raises(ValueError, match="in pieces of 0"):
        kernels.crc32c_each(t.data_ptr(), 16, 0)
