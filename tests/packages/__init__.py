"""Packages built on Lightning, trained through their own entry points: ``python -m tests.packages``."""
