"""Counts what a `DataLoader` has given, and after a restart gives what comes next; [Note: resume]."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_ssd.data.generators import States, generator_states, set_generator_states
from lightning_ssd.errors import CheckpointError


@dataclass
class Restart:
    """A checkpoint's entry, from which a run resumes.

    Attributes:
        generators: Generator states to continue with.
        epoch_is_over: The checkpoint was saved after the last batch of an epoch.
        loaders: What `Place.state` returned, for each loader.
        has_started: Training has started. Before that Lightning prefetches from a loader without length.
        in_epoch: Lightning continues with the next batch, without the hooks at the beginning of an epoch.
    """

    generators: States
    epoch_is_over: bool
    loaders: list[dict[str, Any]]
    has_started: bool = False
    in_epoch: bool = False


class Place:
    """A loader's position in its epoch.

    Attributes:
        num_batches: Batches drawn from this epoch's iterator.
        restart: The entry to resume from, until the first batch.
        saved: This loader's part of the entry.
    """

    def __init__(self, loader: DataLoader[Any], restart: Restart | None, number: int) -> None:
        self._own = _own_generators(loader)
        self._is_drawn_ahead = isinstance(loader.dataset, IterableDataset)
        self.restart = restart if restart is not None and number < len(restart.loaders) else None
        self.saved = self.restart.loaders[number] if self.restart is not None else {}
        self.begin_epoch()

    def state(self, max_ahead: int) -> dict[str, Any]:
        """This loader's part of the entry; ``max_ahead`` batches were drawn but not used yet."""
        return {
            "begin": self._begin,
            "first": self._first,
            "own_begin": self._own_begin,
            "own": [generator.get_state() for generator in self._own],
            "num_batches": self.num_batches,
            "ahead": list(self._draws)[len(self._draws) - max_ahead :],
        }

    def begin_epoch(self) -> None:
        """An iterator is about to be made."""
        self._begin = self._first = generator_states()
        self._own_begin = [generator.get_state() for generator in self._own]
        self._draws: deque[States] = deque(maxlen=2)  # states before the last draws
        self.num_batches = 0

    def draw(self, iterator: Any) -> Any:
        """The next batch."""
        if self.num_batches == 0:
            self._first = generator_states()
        if self._is_drawn_ahead:
            self._draws.append(generator_states())
        batch = next(iterator)
        self.num_batches += 1
        return batch

    def set_own_generators(self, key: str) -> None:
        """Set the generators that belong to the loader as they were."""
        for generator, state in zip(self._own, self.saved[key], strict=False):
            generator.set_state(state)


def resumable_class(cls: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    """A subclass of the loader's own class that counts its batches; [Note: resume]."""
    # Not a mixin: an object's class can be changed only to one with the same memory layout.
    members = {
        "__module__": cls.__module__,
        "__iter__": lambda self: Batches(self._ssd_offload_place, self, cls),
        "_ssd_offload_class": cls,
        # Lightning resumes in mid-epoch only if a loader has these; the state is in `Resume`.
        "state_dict": lambda self: {},
        "load_state_dict": lambda self, state: None,
    }
    return type(cls.__name__, (cls,), members)


class Batches:
    """One epoch's iterator. The inner iterator is made at once, or after a restart with the first batch."""

    def __init__(self, place: Place, loader: DataLoader[Any], cls: type[DataLoader[Any]]) -> None:
        self._place = place
        self._loader = loader
        self._class = cls
        self._ahead: list[Any] = []  # drawn but not used before the checkpoint
        self._inner: Any = None
        if place.restart is None:
            self._begin()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        restart, self._place.restart = self._place.restart, None
        if restart is not None:
            self._resume(restart)
        if self._ahead:
            return self._ahead.pop(0)
        batch = self._place.draw(self._inner)
        if restart is not None and not restart.has_started:
            restart.generators = generator_states()
        return batch

    def _begin(self) -> None:
        self._place.begin_epoch()
        self._inner = self._class.__iter__(self._loader)

    def _resume(self, restart: Restart) -> None:
        place = self._place
        if not restart.epoch_is_over or restart.in_epoch or not restart.has_started:
            set_generator_states(restart.generators)
        if restart.epoch_is_over:
            place.set_own_generators("own")
            self._begin()
            return
        set_generator_states(place.saved["begin"])
        place.set_own_generators("own_begin")
        self._begin()
        set_generator_states(place.saved["first"])
        self._draw_again(place.saved["num_batches"], place.saved["ahead"])
        set_generator_states(restart.generators)

    def _draw_again(self, num_batches: int, ahead: list[States]) -> None:
        num_used = num_batches - len(ahead)
        for number in range(num_batches):
            if number >= num_used:
                set_generator_states(ahead[number - num_used])
            try:
                batch = self._place.draw(self._inner)
            except StopIteration:
                raise CheckpointError(
                    f"the checkpoint was saved after {num_used} batches of an epoch, the training data loader has only "
                    f"{number}: resume with the data and batch size it was saved with, or from the end of an epoch"
                ) from None
            if number >= num_used:
                self._ahead.append(batch)


def _own_generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """Generators of the loader itself."""
    found = [loader.generator, getattr(loader.sampler, "generator", None)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
