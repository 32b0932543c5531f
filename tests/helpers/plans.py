"""Plans that a test chooses: any that the planner could make with the right budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lightning_ssd.memory import plan


def choose_plan(
    monkeypatch: pytest.MonkeyPatch, choose: Callable[[Any], dict[str, Any]] | None = None, **choices: Any
) -> None:
    """Make every plan that has a budget grow by ``choices`` alone, such as ``keep_cache=True``.

    Args:
        monkeypatch: Undoes it.
        choose: Gets the draft and returns choices that depend on it, such as which units are kept.
        choices: Attributes of the draft.
    """

    def grow(draft: Any, budget: int) -> None:
        found = choices | (choose(draft) if choose is not None else {})
        for name, value in found.items():
            setattr(draft, name, getattr(draft, name) | value if isinstance(value, set) else value)

    monkeypatch.setattr(plan._Draft, "grow", grow)
    # A plan that holds everything in memory is not among those to choose from: it fits in no budget.
    monkeypatch.setattr(plan._Draft, "hold_everything", lambda draft: setattr(draft, "spill_nbytes", 1 << 62))
