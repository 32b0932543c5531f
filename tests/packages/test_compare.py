"""What `make packages` calls equal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.packages.compare import arrays, differences, is_equal


def numbers(*values: float, dtype: Any = np.float32) -> dict[str, Any]:
    return {"a": np.array(values, dtype)}


@pytest.mark.parametrize(
    ("one", "other", "largest"),
    [
        (numbers(1, math.nan), numbers(1, math.nan), 0.0),
        (numbers(0.0), numbers(-0.0), 5e-324),  # the bits differ, the numbers do not: still not equal
        (numbers(1, 2), numbers(1, 2.5), 0.5),
        (numbers(1, math.nan), numbers(math.nan, 1), math.inf),
        (numbers(1), numbers(1, 1), math.inf),
        (numbers(1), numbers(1, dtype=np.float64), math.inf),
        (numbers(1), {"b": np.ones(1, np.float32)}, math.inf),
    ],
)
def test_a_difference_is_of_bits(one: dict[str, Any], other: dict[str, Any], largest: float) -> None:
    assert differences(one, other) == largest


def test_numbers_are_found_in_any_nesting() -> None:
    value = {"x": [torch.ones(2, dtype=torch.bfloat16), (np.zeros(1), 3)], "none": None, "lists": [1.0, 2.0]}
    found = dict(arrays(value))
    assert {name: array.tolist() for name, array in found.items()} == {
        ".x.0": [1.0, 1.0],
        ".x.1.0": [0.0],
        ".x.1.1": 3,
        ".lists": [1.0, 2.0],
    }


@pytest.mark.parametrize(
    ("line", "equal"),
    [
        ({"losses": 0.0, "resumed": 0.0}, True),
        ({"losses": 0.0, "resumed": 0.1}, False),
        ({"losses": 0.0, "resumed": 0.1, "resume_note": "why"}, True),
        ({"losses": 1e-9, "resume_note": "why"}, False),
        ({"error": "why"}, False),
        ({"refused": "why"}, True),
    ],
)
def test_a_line_is_equal_if_all_is(line: dict[str, Any], equal: bool) -> None:
    assert is_equal(line) is equal
