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

import math
from copy import deepcopy
from typing import Any

from torch.utils.data import DataLoader

from lightning_ssd.data.generators import generator_states, set_generator_states
from lightning_ssd.data.resumable import Place, Restart, resumable_class

KEY = "ssd_offload_resume"


class Resume:
    """Saves and restores random generators and positions in the training data."""

    def __init__(self) -> None:
        self._restart: Restart | None = None
        self._watched: list[tuple[DataLoader[Any], Place]] = []

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
            self._restart = Restart(**saved)

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
            loader.__class__ = resumable_class(type(loader))
        loader._ssd_offload_place = place = Place(loader, self._restart, len(self._watched))
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
            val_loop = epoch_loop.val_loop
            val_loop.restarting = False
            counted = deepcopy(val_loop.batch_progress.state_dict())
            val_loop.run()
            if any(map(math.isfinite, val_loop.max_batches)):  # Lightning is going to count it as if it had been run
                val_loop.batch_progress.load_state_dict(counted)
            trainer.training = True
            restart.generators = generator_states()

    def begin_batch(self) -> None:
        """A training batch starts: set the generators now if no watched loader has done so."""
        restart, self._restart = self._restart, None
        if restart is not None and not self._watched:
            set_generator_states(restart.generators)

    def _places_in_use(self, trainer: Any) -> list[Place]:
        """Positions of the loaders that training draws from now. Lightning calls `watch` anew for each reload."""
        in_use = getattr(trainer.fit_loop._combined_loader, "flattened", ())
        newest = {id(loader): place for loader, place in self._watched}
        return [newest[id(loader)] for loader in in_use if id(loader) in newest]
