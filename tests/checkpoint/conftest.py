from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.support import Training


@pytest.fixture
def training(tmp_store: Path) -> Training:
    live = tmp_store / "live"
    live.mkdir()
    training = Training(live)
    training.advance()
    return training
