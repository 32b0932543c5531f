"""The place in the loop: generator states and the position in the training data, so that a resumed run goes on as if
it had never stopped.

[Note: resume] A training `DataLoader` is watched: when an epoch's iterator is made, the generator states of that moment
are kept, and batches are counted. After a restart the first batch is asked for like this: generators are set as at the
epoch's start, the iterator is made (so it shuffles as it did), batches already used are drawn and dropped, and then the
generators are set as they were when the checkpoint was saved.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

KEY = "ssd_offload_resume"


class Resume:
    """Saves and restores the place in the loop."""

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None
        self._loaders: list[Any] = []

    def state(self, trainer: Any) -> dict[str, Any]:
        """What a checkpoint carries."""
        epoch_is_over = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        num_ahead = len(getattr(trainer.fit_loop._data_fetcher, "batches", None) or ())
        loaders = [
            {"begin": loader.epoch_begin, "num_batches": loader.num_batches, "num_ahead": num_ahead}
            for loader in self._loaders
        ]
        return {KEY: {"generators": generator_states(), "epoch_is_over": epoch_is_over, "loaders": loaders}}

    def take(self, checkpoint: dict[str, Any]) -> None:
        """Remember what a checkpoint carries, for the loaders to come."""
        self._pending = checkpoint.pop(KEY, None)

    def begin(self, *, is_fit: bool) -> None:
        """The Trainer starts: loaders of an earlier run are not watched any more."""
        self._loaders = []
        if not is_fit:
            self._pending = None

    def watch(self, loader: Any) -> Any:
        """Make a training `DataLoader` resumable; other iterables are left alone."""
        is_ours = hasattr(type(loader), "_ssd_offload_plain_iter")
        if not isinstance(loader, DataLoader) or (hasattr(loader, "state_dict") and not is_ours):
            return loader
        if not is_ours:
            loader.__class__ = _resumable(type(loader))
        place = None
        if self._pending is not None and len(self._loaders) < len(self._pending["loaders"]):
            place = {**self._pending, **self._pending["loaders"][len(self._loaders)]}
        loader.resume_from = place
        loader.epoch_begin = generator_states()
        loader.num_batches = 0
        self._loaders.append(loader)
        return loader

    def begin_batch(self) -> None:
        """A training batch starts: where no loader of ours did it, the generators are set now."""
        pending, self._pending = self._pending, None
        if pending is not None and not self._loaders:
            set_generator_states(pending["generators"])


def _resumable(cls: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    """A subclass of the loader's own class that knows where it is in its epoch; [Note: resume].

    Its instances have ``epoch_begin`` (generator states when the iterator was made), ``num_batches`` (drawn from it)
    and ``resume_from`` (the place in a checkpoint, until the first batch).
    """
    # Not a mixin: Python lets an object change its class only along single inheritance.
    members = {
        "__module__": cls.__module__,
        "__iter__": lambda self: _Batches(self, lambda: cls.__iter__(self)),
        "_ssd_offload_plain_iter": cls.__iter__,
        # Lightning asks for these before it believes that a loader can go on in mid-epoch; `Resume` has the state.
        "state_dict": lambda self: {},
        "load_state_dict": lambda self, state: None,
    }
    return type(cls.__name__, (cls,), members)


class _Batches:
    """One epoch's iterator. After a restart the inner one is made with the first batch, else at once."""

    def __init__(self, loader: Any, make: Any) -> None:
        self._loader = loader
        self._make = make
        self._ahead: list[Any] = []  # drawn before the checkpoint, not used yet
        self._inner: Any = None
        if loader.resume_from is None:
            self._begin()

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        if self._inner is None:
            self._resume()
        if self._ahead:
            return self._ahead.pop(0)
        batch = next(self._inner)
        self._loader.num_batches += 1
        return batch

    def _begin(self) -> None:
        self._loader.epoch_begin = generator_states()
        self._loader.num_batches = 0
        self._inner = self._make()

    def _resume(self) -> None:
        place, self._loader.resume_from = self._loader.resume_from, None
        if place is None or place["epoch_is_over"]:
            if place is not None:
                set_generator_states(place["generators"])
            self._begin()
            return
        set_generator_states(place["begin"])
        self._begin()
        num_used = place["num_batches"] - place["num_ahead"]
        for number in range(place["num_batches"]):
            batch = next(self._inner)
            if number >= num_used:
                self._ahead.append(batch)
        self._loader.num_batches = place["num_batches"]
        set_generator_states(place["generators"])


def generator_states() -> dict[str, Any]:
    """States of the Python, NumPy, torch CPU and torch CUDA generators, as tensors and numbers only."""
    version, inner, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, torch.tensor(inner, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
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
