"""Fixtures of tests that train."""

from tests.helpers.fixtures import _poisoned_pools, _sessions_end  # noqa: F401
