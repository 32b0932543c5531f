"""The pool lends every byte to one owner at a time, takes everything back, and never under a tensor that is alive."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from lightning_ssd.errors import ResidencyError
from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.sizes import BLOCK_NBYTES, round_up
from tests.helpers.pools import lingering, num_lent

NBYTES = 16 * BLOCK_NBYTES


class Lending(RuleBasedStateMachine):
    """Random lending, keeping of tensors, and giving back; each buffer is filled with a number of its own."""

    @initialize()
    def begin(self) -> None:
        self.pool = Pool(NBYTES, "test", poison=True)
        self.held: list[tuple[Buffer, int]] = []
        self.kept: list[tuple[Tensor, int]] = []
        self.number = 0

    @rule(nbytes=st.integers(1, 6 * BLOCK_NBYTES))
    def lend(self, nbytes: int) -> None:
        buffer = self.pool.try_lend(nbytes, f"owner {self.number}")
        if buffer is None:
            return
        assert buffer.nbytes == round_up(nbytes)
        assert buffer.address % BLOCK_NBYTES == 0
        bytes_found = set(buffer.tensor(0, torch.uint8, (buffer.nbytes,)).unique().tolist())
        assert bytes_found <= {0, 255}  # never lent before, or poisoned: nobody's numbers
        self.number = self.number % 254 + 1
        buffer.fill(self.number)
        self.held.append((buffer, self.number))

    @rule(data=st.data(), keep=st.booleans())
    def give_back(self, data: st.DataObject, keep: bool) -> None:
        if self.held:
            buffer, number = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            if keep:
                view = buffer.tensor(BLOCK_NBYTES // 2, torch.uint8, (4, 8))[1:, ::2]
                self.kept.append((view, number))
            self.pool.give_back(buffer)

    @rule(data=st.data())
    def drop_tensor(self, data: st.DataObject) -> None:
        if self.kept:
            del self.kept[data.draw(st.integers(0, len(self.kept) - 1))]

    @invariant()
    def nobody_wrote_over_anybody(self) -> None:
        for buffer, number in self.held:
            assert bool((buffer.tensor(0, torch.uint8, (buffer.nbytes,)) == number).all())
        for tensor, number in self.kept:
            assert bool((tensor == number).all())

    @invariant()
    def only_kept_tensors_linger(self) -> None:
        assert len(lingering(self.pool)) == len(self.kept)
        assert num_lent(self.pool) == len(self.held)

    def teardown(self) -> None:
        self.kept.clear()
        for buffer, _ in self.held:
            self.pool.give_back(buffer)
        whole = self.pool.try_lend(NBYTES, "everything")  # all neighbours were joined again
        assert whole is not None


TestLending = Lending.TestCase
TestLending.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, database=None)


def test_no_room_names_who_holds_and_who_keeps() -> None:
    pool = Pool(4 * BLOCK_NBYTES, "parameter")
    first, second = pool.lend(BLOCK_NBYTES, "unit 'a'"), pool.lend(2 * BLOCK_NBYTES, "unit 'b'")
    view = second.tensor(0, torch.float32, (3,))
    pool.give_back(second)
    with pytest.raises(ResidencyError, match=r"'c' needs 12.00 KiB of the parameter pool \(16.00 KiB in all\)") as e:
        pool.lend(3 * BLOCK_NBYTES, "unit 'c'")
    for part in ("in use: unit 'a' 4.00 KiB", "kept outside: unit 'b' 8.00 KiB", "raise host_memory"):
        assert part in str(e.value)
    pool.give_back(first)
    del view
    gc.collect()
    assert pool.lend(4 * BLOCK_NBYTES, "unit 'c'").offset == 0


def test_make_room_is_asked_until_there_is_room() -> None:
    pool = Pool(4 * BLOCK_NBYTES, "parameter")
    held = [pool.lend(BLOCK_NBYTES, f"unit {i}") for i in range(4)]
    asked = 0

    def make_room() -> bool:
        nonlocal asked
        asked += 1
        pool.give_back(held.pop())
        return True

    pool.lend(3 * BLOCK_NBYTES, "unit 4", make_room)
    assert asked == 3


def test_a_buffer_is_given_back_once() -> None:
    pool = Pool(BLOCK_NBYTES, "update")
    buffer = pool.lend(1, "unit 'a'")
    pool.give_back(buffer)
    with pytest.raises(ResidencyError, match="update: buffer of unit 'a' was given back twice"):
        pool.give_back(buffer)
    pool.lend(1, "unit 'b'")
    with pytest.raises(ResidencyError, match="given back twice"):
        pool.give_back(buffer)  # the same place has another owner now
    assert num_lent(pool) == 1


def test_tensors_outlive_the_pool() -> None:
    pool = Pool(BLOCK_NBYTES, "parameter")
    tensor = pool.lend(64, "unit 'a'").tensor(0, torch.float32, (16,))
    tensor.fill_(3)
    pool.close()
    del pool
    gc.collect()
    assert tensor.sum() == 48


def test_two_buffers_always_fit_where_the_sum_of_the_two_largest_does() -> None:
    pool = Pool(7 * 4096, "test")
    random.seed(0)
    held = pool.lend(4096, "first")
    for _ in range(1000):  # one in use, one arriving, as in a forward through units of many sizes
        arriving = pool.lend(random.choice([1, 2, 3, 4] if held.nbytes <= 3 * 4096 else [1, 2, 3]) * 4096, "next")
        pool.give_back(held)
        held = arriving
