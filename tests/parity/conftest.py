"""Fixtures of tests that train."""

from tests.helpers.activations import spilling  # noqa: F401
from tests.helpers.fixtures import _poisoned_pools, _sessions_end, _small_states_are_links  # noqa: F401
