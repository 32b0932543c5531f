"""Fixtures of tests of other formats."""

from tests.checkpoint.conftest import training  # noqa: F401
