"""Saves and restores random generators and the position in the training data, so that a resumed run continues as if it
had never stopped.

[Note: resume] A training `DataLoader` is watched. For each epoch we record the generator states at two moments: when
the iterator is made, and when the first batch is drawn, which is when it shuffles. Batches are counted. After a
restart, when the first batch is asked for:

1. generators are set to the recorded states and the iterator is made, so that it shuffles the same way;
2. as many batches as had been used are drawn and dropped;
3. generators are set to the states of the moment of the save.

Lightning skips a validation that was due right after the save. We run it, since it changes generators, schedulers and
callbacks.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_ssd.errors import CheckpointError

KEY = "ssd_offload_resume"

States = dict[str, Any]
"""What `generator_states` returns."""


class Resume:
    """Saves and restores random generators and positions in the training data."""

    def __init__(self) -> None:
        self._restart: _Restart | None = None
        self._watched: list[tuple[DataLoader[Any], _Place]] = []

    def state(self, trainer: Any) -> dict[str, Any]:
        """The entry for a checkpoint."""
        epoch_is_over = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        max_ahead = len(getattr(trainer.fit_loop._data_fetcher, "batches", None) or ())
        loaders = [place.state(max_ahead) for place in self._places_in_use(trainer)]
        return {KEY: {"generators": generator_states(), "epoch_is_over": epoch_is_over, "loaders": loaders}}

    def take(self, checkpoint: dict[str, Any], *, is_resumed: bool) -> None:
        """Remove our entry from a checkpoint; if ``fit`` resumes from it, keep the entry for the loaders to come.

        A Tuner loads its own checkpoint, and an evaluation only needs the weights: neither changes how training begins.
        """
        saved = checkpoint.pop(KEY, None)
        if saved is not None and is_resumed:
            self._restart = _Restart(**saved)

    def begin(self) -> None:
        """The Trainer starts: forget the earlier run."""
        self.end()
        self._watched = []
        self._restart = None

    def end(self) -> None:
        """The Trainer has ended: give loaders their own class back. `state` still works."""
        for loader, _ in self._watched:
            if "_ssd_offload_place" in vars(loader):
                loader.__class__ = type(loader)._ssd_offload_class  # type: ignore[attr-defined]
                del vars(loader)["_ssd_offload_place"]

    def watch(self, loader: Any) -> Any:
        """Make a training `DataLoader` resumable; other iterables are left alone."""
        is_ours = hasattr(type(loader), "_ssd_offload_class")
        if not isinstance(loader, DataLoader) or (hasattr(loader, "state_dict") and not is_ours):
            return loader
        if not is_ours:
            loader.__class__ = _resumable(type(loader))
        loader._ssd_offload_place = place = _Place(loader, self._restart, len(self._watched))
        self._watched.append((loader, place))
        return loader

    def start(self, trainer: Any) -> None:
        """Training starts: set the generators to the checkpoint's states."""
        restart = self._restart
        if restart is None:
            return
        fit_loop = trainer.fit_loop
        restart.has_started = True
        restart.in_epoch = fit_loop.restarted_mid_epoch
        set_generator_states(restart.generators)
        epoch_loop = fit_loop.epoch_loop
        total = fit_loop.epoch_progress.total
        if restart.epoch_is_over and not restart.in_epoch and total.ready == total.completed:
            # Saved after fit. Lightning would continue the epoch that is over, with one batch or none.
            epoch_loop.batch_progress.reset_on_run()
            epoch_loop.scheduler_progress.reset_on_run()
            epoch_loop.automatic_optimization.optim_progress.reset_on_run()
        if epoch_loop.restarted_on_train_batch_end and epoch_loop._should_check_val_fx(fit_loop._data_fetcher):
            trainer.validating = True
            epoch_loop.val_loop.restarting = False
            epoch_loop.val_loop.run()
            trainer.training = True
            restart.generators = generator_states()

    def begin_batch(self) -> None:
        """A training batch starts: set the generators now if no watched loader has done so."""
        restart, self._restart = self._restart, None
        if restart is not None and not self._watched:
            set_generator_states(restart.generators)

    def _places_in_use(self, trainer: Any) -> list[_Place]:
        """Positions of the loaders that training draws from now. Lightning calls `watch` anew for each reload."""
        in_use = getattr(trainer.fit_loop._combined_loader, "flattened", ())
        newest = {id(loader): place for loader, place in self._watched}
        return [newest[id(loader)] for loader in in_use if id(loader) in newest]


@dataclass
class _Restart:
    """A checkpoint's entry, from which a run resumes.

    Attributes:
        generators: Generator states to continue with.
        epoch_is_over: The checkpoint was saved after the last batch of an epoch.
        loaders: What `_Place.state` returned, for each loader.
        has_started: Training has started. Before that Lightning prefetches from a loader without length.
        in_epoch: Lightning continues with the next batch, without the hooks at the beginning of an epoch.
    """

    generators: States
    epoch_is_over: bool
    loaders: list[dict[str, Any]]
    has_started: bool = False
    in_epoch: bool = False


class _Place:
    """A loader's position in its epoch.

    Attributes:
        num_batches: Batches drawn from this epoch's iterator.
        restart: The entry to resume from, until the first batch.
        saved: This loader's part of the entry.
    """

    def __init__(self, loader: DataLoader[Any], restart: _Restart | None, number: int) -> None:
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


def _resumable(cls: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    """A subclass of the loader's own class that counts its batches; [Note: resume]."""
    # Not a mixin: an object's class can be changed only to one with the same memory layout.
    members = {
        "__module__": cls.__module__,
        "__iter__": lambda self: _Batches(self._ssd_offload_place, self, cls),
        "_ssd_offload_class": cls,
        # Lightning resumes in mid-epoch only if a loader has these; the state is in `Resume`.
        "state_dict": lambda self: {},
        "load_state_dict": lambda self, state: None,
    }
    return type(cls.__name__, (cls,), members)


class _Batches:
    """One epoch's iterator. The inner iterator is made at once, or after a restart with the first batch."""

    def __init__(self, place: _Place, loader: DataLoader[Any], cls: type[DataLoader[Any]]) -> None:
        self._place = place
        self._loader = loader
        self._class = cls
        self._ahead: list[Any] = []  # drawn but not used before the checkpoint
        self._inner: Any = None
        if place.restart is None:
            self._begin()

    def __iter__(self) -> _Batches:
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

    def _resume(self, restart: _Restart) -> None:
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


def generator_states() -> dict[str, Any]:
    """States of the Python, NumPy, torch CPU and torch CUDA generators, as tensors and numbers only."""
    version, inner, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, torch.tensor(inner, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_generator_states(states: dict[str, Any]) -> None:
    """Undo `generator_states`; CUDA states are set on as many devices as there are."""
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner.tolist()), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    for device, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state.cpu(), device)
