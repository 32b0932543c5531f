"""A CUDA device made of host memory, which checks what it is given; see README.md here."""

from __future__ import annotations

import os
import zlib
from typing import NamedTuple

POLICIES = ("mixed", "late", "others_first", "in_order")  # as `Policy` in native/streams.hpp numbers them


class Switch(NamedTuple):
    """What the environment variable ``TEST_DEVICE`` asks for.

    Attributes:
        seeds: Every test runs with each of them, or with one of them if there is a turn.
        policy: Which orders of work are drawn, one of `POLICIES`.
        turn: Which one; a test has had each after as many turns as there are seeds.
    """

    seeds: tuple[int, ...]
    policy: str
    turn: int | None = None

    def seed_of(self, test: str) -> int:
        """The seed that the test with this id has in this turn."""
        return self.seeds[(zlib.crc32(test.encode()) + (self.turn or 0)) % len(self.seeds)]


def requested() -> Switch | None:
    """The simulated device that tests are to run on; None if they run as they are.

    ``TEST_DEVICE`` is ``simulated_cuda[:SEEDS[:POLICY]]``, where ``SEEDS`` is a number, a range such as ``0-4``, or a
    turn such as ``3/20``: each test runs once, with a seed of 0 to 19 that its name draws, another in each turn.

    Raises:
        ValueError: It is something else.
    """
    text = os.environ.get("TEST_DEVICE", "")
    if not text:
        return None
    name, seeds, policy = (*text.split(":"), "", "")[:3]
    policy = policy or POLICIES[0]
    if name != "simulated_cuda" or policy not in POLICIES:
        raise ValueError(f"TEST_DEVICE={text!r}: use simulated_cuda[:SEEDS[:POLICY]], with a policy of {POLICIES}")
    turn, _, num_turns = seeds.partition("/")
    if num_turns:
        return Switch(tuple(range(int(num_turns))), policy, int(turn))
    first, _, last = (seeds or "0").partition("-")
    return Switch(tuple(range(int(first), int(last or first) + 1)), policy)
