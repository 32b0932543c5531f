"""The budget that gradients and saved inputs share: what one takes beyond its own, the other does not get."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ssd.memory.budget import SharedBudget

NBYTES = st.integers(0, 1000)


def test_gradients_use_what_saved_inputs_leave_free() -> None:
    budget = SharedBudget(gradients_nbytes=10, saved_inputs_nbytes=100)
    assert budget.gradients_limit_nbytes == 110
    budget.held_saved_inputs_nbytes = 70
    assert budget.gradients_limit_nbytes == 40
    budget.held_saved_inputs_nbytes = 130  # an input that its caller has let go of since
    assert budget.gradients_limit_nbytes == 10


def test_saved_inputs_get_less_while_gradients_use_their_reserve() -> None:
    budget = SharedBudget(gradients_nbytes=10, saved_inputs_nbytes=100)
    budget.held_gradients_nbytes = 10
    assert budget.saved_inputs_limit_nbytes == 100
    budget.held_gradients_nbytes = 40
    assert budget.saved_inputs_limit_nbytes == 70
    budget.held_gradients_nbytes = 500
    assert budget.saved_inputs_limit_nbytes == 0


def test_on_a_gpu_gradients_keep_to_their_own_reserve() -> None:
    assert SharedBudget(gradients_nbytes=10, saved_inputs_nbytes=100, lends=False).gradients_limit_nbytes == 10


def test_without_a_bound_nothing_is_lent() -> None:
    budget = SharedBudget(gradients_nbytes=10, saved_inputs_nbytes=None)
    budget.held_gradients_nbytes = 50
    assert budget.gradients_limit_nbytes == 10
    assert budget.saved_inputs_limit_nbytes is None


@given(NBYTES, NBYTES, st.lists(st.tuples(st.booleans(), NBYTES), max_size=40))
@settings(deadline=None, database=None)
def test_who_asks_first_never_exceeds_the_reserve(gradients: int, inputs: int, asks: list[tuple[bool, int]]) -> None:
    budget = SharedBudget(gradients_nbytes=gradients, saved_inputs_nbytes=inputs)
    for is_gradient, nbytes in asks:
        if is_gradient and budget.held_gradients_nbytes + nbytes <= budget.gradients_limit_nbytes:
            budget.held_gradients_nbytes += nbytes
        limit = budget.saved_inputs_limit_nbytes
        if not is_gradient and limit is not None and budget.held_saved_inputs_nbytes + nbytes <= limit:
            budget.held_saved_inputs_nbytes += nbytes
        assert budget.held_gradients_nbytes + budget.held_saved_inputs_nbytes <= gradients + inputs
