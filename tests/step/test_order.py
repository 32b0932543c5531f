"""Order of events: reads run ahead of use, and updates run while backward goes on, or after it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from tests.faults.support import streamed
from tests.helpers.events import Events
from tests.helpers.models import GPT
from tests.helpers.training import train


class Traced(pl.Callback):
    """Events of the third step: the order of use has been learned in the first."""

    def __init__(self) -> None:
        self.events = Events()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.events.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.events.__exit__()


def trace(tmp_path: Path, options: dict[str, Any] | None = None, **settings: Any) -> list[str]:
    traced = Traced()
    train(tmp_path, GPT, streamed(**settings), max_steps=3, callbacks=[traced], **(options or {}))
    return [event.replace(" net.", " ") for event in traced.events.found]


@pytest.mark.not_simulated(reason="on a device units are not read ahead: they stay there, and copies run ahead")
def test_reads_run_one_unit_ahead(tmp_path: Path) -> None:
    events = trace(tmp_path, overlap="off")  # beside updates it depends on when these are done
    forward = events[: events.index("recompute blocks.2")]
    order = ["blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    for this, following in pairwise(order):
        # While one runs the next is being read, and it is the only one.
        assert forward.index(f"fetch {this}") < forward.index(f"prefetch {following}")
        assert forward.index(f"prefetch {following}") < forward.index(f"release {this}")
        assert forward.index(f"release {this}") < forward.index(f"fetch {following}")
    back = events[events.index("recompute blocks.2") :]
    for this, following in (("blocks.2", "blocks.1"), ("blocks.1", "blocks.0")):
        assert back.index(f"fetch {this}") < back.index(f"prefetch {following}") < back.index(f"fetch {following}")


@pytest.mark.not_simulated(reason="on a device units are not read ahead: they stay there, and copies run ahead")
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_the_window_is_how_far_they_run(tmp_path: Path, window: int) -> None:
    events = trace(tmp_path, window=window, overlap="off")
    running = events[events.index("fetch blocks.0") + 1 : events.index("release blocks.0")]
    asked = [event for event in running if event.startswith("prefetch")]
    ahead = ["prefetch blocks.1", "prefetch blocks.2", "prefetch norm"][: window - 1]
    assert asked == ahead[-1:]  # those nearer were asked for before


@pytest.mark.parametrize("prefetch_batch", [1, 2])
def test_a_batch_of_units_is_read_together(tmp_path: Path, prefetch_batch: int) -> None:
    events = trace(tmp_path, window=5, prefetch_batch=prefetch_batch, overlap="off")
    together = ("prefetch blocks.2", "prefetch norm") in pairwise(events)
    assert together == (prefetch_batch == 2)


@pytest.mark.parametrize("overlap", ["auto", "off"])
def test_what_an_update_will_replace_is_not_read_for_the_next_step(tmp_path: Path, overlap: str) -> None:
    events = trace(tmp_path, window=5, overlap=overlap)
    for name in ("net", "tok"):  # backward does not need them, the next forward does
        back = events[events.index("recompute blocks.2") :]
        assert f"prefetch {name}" not in back[: back.index(f"update {name}")]


@pytest.mark.parametrize("update", ["native", "torch"])
def test_updates_run_during_backward_or_after_it(tmp_path: Path, update: str) -> None:
    events = trace(tmp_path, overlap="auto", update=update)
    assert events.index("updated head") < events.index("recompute blocks.2")
    assert events.index("updated blocks.2") < events.index("recompute blocks.0")
    events = trace(tmp_path, overlap="off", update=update)
    first_update = next(i for i, event in enumerate(events) if event.startswith("update "))
    last_of_backward = max(i for i, event in enumerate(events) if event.startswith("recompute"))
    assert last_of_backward < first_update


@pytest.mark.parametrize("update", ["native", "torch"])
def test_after_a_gate_updates_run_under_the_next_forward(tmp_path: Path, update: str) -> None:
    events = trace(tmp_path, {"gradient_clip_val": 0.5}, update=update)
    forward = events[: events.index("recompute blocks.2")]
    order = ["tok", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    if update == "torch":  # what such a class leaves in its groups is needed before the next step
        assert not any(event.startswith("update") for event in forward)
        return
    updates = [event for event in forward if event.startswith("updated ")]
    assert updates == sorted(updates, key=lambda event: order.index(event.split()[1]) if "net" not in event else -1)
    for name in order[2:]:  # each before it is needed, the soonest first; the first ones may be done before we listen
        assert forward.index(f"updated {name}") < forward.index(f"fetch {name}")
    assert forward.index("fetch tok") < forward.index("update head")
    back = events[events.index("recompute blocks.2") :]
    assert not any(
        event.startswith("updated") and event != "updated net" for event in back[: back.index("fetch blocks.0")]
    )


def test_no_unit_is_updated_twice_or_left_out(tmp_path: Path) -> None:
    for overlap in ("auto", "off"):
        events = trace(tmp_path, overlap=overlap)
        updates = sorted(event for event in events if event.startswith("update "))
        names = ["blocks.0", "blocks.1", "blocks.2", "head", "net", "norm", "tok"]
        assert updates == [f"update {name}" for name in names]
