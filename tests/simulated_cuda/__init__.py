"""A CUDA device made of host memory, which checks what it is given; see README.md here."""

from __future__ import annotations

import os
from typing import NamedTuple

POLICIES = ("mixed", "late", "others_first", "in_order")  # as `Policy` in native/streams.hpp numbers them


class Switch(NamedTuple):
    """What the environment variable ``TEST_DEVICE`` asks for.

    Attributes:
        seeds: Every test runs with each of them.
        policy: Which orders of work are drawn, one of `POLICIES`.
    """

    seeds: tuple[int, ...]
    policy: str


def requested() -> Switch | None:
    """The simulated device that tests are to run on; None if they run as they are.

    ``TEST_DEVICE`` is ``simulated_cuda[:SEEDS[:POLICY]]``, where ``SEEDS`` is a number or a range such as ``0-4``.

    Raises:
        ValueError: It is something else.
    """
    text = os.environ.get("TEST_DEVICE", "")
    if not text:
        return None
    name, seeds, policy = (*text.split(":"), "", "")[:3]
    first, _, last = (seeds or "0").partition("-")
    policy = policy or POLICIES[0]
    if name != "simulated_cuda" or policy not in POLICIES:
        raise ValueError(f"TEST_DEVICE={text!r}: use simulated_cuda[:SEEDS[:POLICY]], with a policy of {POLICIES}")
    return Switch(tuple(range(int(first), int(last or first) + 1)), policy)
