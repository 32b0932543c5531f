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


@pytest.fixture
def saved(tmp_store: Path, training: Training) -> Path:
    """A checkpoint in the form ``links``."""
    path = tmp_store / "c" / "x.ckpt"
    training.save(path, with_file=True)
    return path
