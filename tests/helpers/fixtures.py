"""Fixtures for tests that train."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from lightning_ssd.memory import plan_pools
from lightning_ssd.memory.pool import Pool
from lightning_ssd.session import sizing
from lightning_ssd.session.session import Session


@pytest.fixture(autouse=True)
def _poisoned_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer is filled with NaN bytes when it is returned, so that a late use shows in the numbers."""
    monkeypatch.setattr(plan_pools, "Pool", functools.partial(Pool, poison=True))


@pytest.fixture(autouse=True)
def _small_states_are_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """``checkpoint="auto"`` saves links however small a state is: what most tests of checkpoints are about."""
    monkeypatch.setattr(sizing, "AUTO_FILE_NBYTES", 0)


@pytest.fixture(autouse=True)
def _sessions_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A session's files stay until the process ends, so that a checkpoint can be saved after fit; not in tests."""
    made: list[Session] = []
    init = Session.__init__

    def recording(self: Session, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Session, "__init__", recording)
    yield
    for each in made:
        each.close()
