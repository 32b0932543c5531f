from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from lightning_ssd.errors import CheckpointError
from lightning_ssd.store.dtypes import TORCH_DTYPE, dtype_of, name_of
from lightning_ssd.store.safetensors_header import ITEMSIZE, TensorEntry, decode_header, encode_header

ENTRIES = (
    TensorEntry("é.weight", "F32", (2, 3), 0, 24),
    TensorEntry("empty", "F64", (0, 3), 24, 24),
    TensorEntry("scalar", "BF16", (), 24, 26),
)


def file_of(header: dict[str, Any] | bytes, data_nbytes: int = 26) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_nbytes)


def item(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_every_dtype_is_read_by_the_formats_own_library(dtype: str, tmp_path: Path) -> None:
    assert TORCH_DTYPE[dtype].itemsize == ITEMSIZE[dtype]
    assert name_of(dtype_of(dtype)) == dtype
    end = 6 * ITEMSIZE[dtype]
    header = encode_header([TensorEntry("w", dtype, (2, 3), 0, end)], {"who": "we"})
    assert len(header) % 4096 == 0
    path = tmp_path / "f.safetensors"
    path.write_bytes(header + bytes(end))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"who": "we"}
        assert file.get_tensor("w").dtype == TORCH_DTYPE[dtype]
    assert decode_header(path.read_bytes(), len(header) + end).entries["w"].shape == (2, 3)


def test_round_trip() -> None:
    header = encode_header(reversed(ENTRIES), {"a": "b"})
    decoded = decode_header(header, len(header) + 26)
    assert tuple(decoded.entries.values()) == ENTRIES
    assert (decoded.metadata, decoded.data_begin, decoded.data_nbytes) == ({"a": "b"}, len(header), 26)


def test_a_tensor_of_other_strides_is_listed_in_the_order_of_its_memory(tmp_path: Path) -> None:
    values = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).permute(2, 0, 1)
    entry = TensorEntry("w", "F32", (4, 2, 3), 0, 96, values.stride())
    header = encode_header([entry])
    path = tmp_path / "f.safetensors"
    path.write_bytes(header + entry.flatten(values).numpy().tobytes())
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("w"), values.permute(1, 2, 0))
    assert decode_header(path.read_bytes(), len(header) + 96).entries["w"] == entry


def strided(value: Any, shape: Any = (2, 3)) -> dict[str, Any]:
    return {"w": item(shape=shape), "__metadata__": {"lightning_ssd.strides": json.dumps({"w": value})}}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"w": item(offsets=(0, 20))}, "needs 24 bytes"),
        ({"w": item(), "v": item(offsets=(20, 44))}, "overlap"),
        ({"w": item(), "v": item(offsets=(25, 49))}, "hole"),
        ({"w": item(shape=(2**62, 2**62, 4))}, "2\\^63"),
        ({"w": item(shape=(0, 2**62, 2**62), offsets=(0, 0))}, "2\\^63"),
        ({"w": item(shape=(-2, -3))}, "counts"),
        ({"w": item(shape=(2.0, 3))}, "counts"),
        ({"w": item(shape=(True, 6))}, "counts"),
        ({"w": item(dtype="F31")}, "F31"),
        ({"w": item(offsets=(24, 0))}, "another"),
        ({"w": item(), "__metadata__": {"a": 1}}, "text to text"),
        (strided([[3, 2], [1, 4]]), "cannot have the strides"),
        (strided([[3, 2], [0, 1]]), "cannot have the strides"),
        (strided([[3, 2], [1]]), "cannot have the strides"),
        (strided([[3, 2], [1, 2**62, 1]]), "cannot have the strides"),
        (strided([[3, 2], [1, -3]]), "in counts"),
        (strided([[3, 2], 1]), "in counts"),
        (strided([[3, 2], [1, 3]], shape=(3, 2)), "disagree"),
        (strided([[2, 2], [1, 2]]), "needs 16 bytes"),
        (strided([[3, 2], [1, 3]]) | {"__metadata__": {"lightning_ssd.strides": "[]"}}, "not an object"),
        (b'{"w":1,"w":1}', "twice"),
        (b"[]", "start with"),
        (b'{"a":' + b"[" * 100_000, "JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", "JSON"),
        (b'{"a":NaN}', "NaN"),
        (b'{"\xff":1}', "UTF-8"),
    ],
)
def test_a_malformed_header_is_refused_with_a_reason(header: Any, says: str) -> None:
    data = file_of(header)
    with pytest.raises(CheckpointError, match=says):
        decode_header(data, len(data), "bad.safetensors")


@pytest.mark.parametrize("announced", [0, 27, 10**8 + 1, 2**64 - 1])
def test_an_announced_length_is_not_trusted(announced: int) -> None:
    data = announced.to_bytes(8, "little") + bytes(26)
    with pytest.raises(CheckpointError):
        decode_header(data, len(data))


VALID = encode_header(ENTRIES).rstrip() + b" " * 3
NUMBERS = st.one_of(
    st.integers(-2, 30), st.sampled_from([2**31, 2**63, 2**64, 10**400, -1, 1.5, None, True, "2", [], {}])
)
EDITS = st.lists(st.tuples(st.integers(0, len(VALID) - 9), st.integers(0, 255)), min_size=1, max_size=4)


def agrees_with_the_library(data: bytes) -> None:
    """What we accept the library accepts as well; what we refuse we refuse with our own error."""
    try:
        decode_header(data, len(data))
    except CheckpointError:
        return
    try:
        deserialize(data)
    except SafetensorError as error:
        pytest.fail(f"we accept what safetensors refuses ({error}): {data!r}")


@settings(max_examples=700, deadline=None)
@given(EDITS)
def test_flipped_bytes(edits: list[tuple[int, int]]) -> None:
    text = bytearray(VALID[8:])
    for position, value in edits:
        text[position] = value
    agrees_with_the_library(file_of(bytes(text)))


@settings(max_examples=700, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["w", "v", "", "__metadata__", "\ud800"]),
        st.one_of(
            NUMBERS,
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from([*ITEMSIZE, "", "f32", 3]),
                    "shape": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)),
                    "data_offsets": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)),
                }
            ),
        ),
        max_size=3,
    )
)
def test_hostile_structure(header: dict[str, Any]) -> None:
    agrees_with_the_library(file_of(header))


def test_torch_types_the_format_lacks_are_named() -> None:
    with pytest.raises(CheckpointError, match="complex128"):
        name_of(torch.complex128)
