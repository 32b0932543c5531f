"""What the Trainer's checkpoints will need of their disks: tried, counted and said before the first step.

[Note: room] Space is checked, not taken. A reservation would hold (kept checkpoints) x (state) from everybody on the
disk for hours in which nothing is in it, and would have to be handed over piece by piece while updates run. What it
protects from, a disk that others fill meanwhile, loses no checkpoint: each file is reserved before it is written, and
the run ends with an error that says so.

A checkpoint of links costs nothing when it is saved, and its size from the next step on, when files it holds are not
written again; but what is frozen is written once for all. So the run needs (kept) x (what changes) beside itself. One
that must be copied costs all of its size at once, before an older one goes: (kept + 1) x (all).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ssd.checkpoint.directory import INNER_NBYTES, is_checkpoint
from lightning_ssd.checkpoint.probe_save import probe_save
from lightning_ssd.errors import ConfigurationError, StoreError
from lightning_ssd.io.folder import device_of
from lightning_ssd.paths import home_path, too_long
from lightning_ssd.sizes import fmt
from lightning_ssd.store.disks import free_nbytes
from lightning_ssd.strategy.session import Session


@dataclass(frozen=True)
class SavingCallback:
    """A callback of the Trainer that saves.

    Attributes:
        name: Class of the callback.
        folder: Where it saves.
        num_kept: Checkpoints that it keeps while steps follow; None if it keeps every one.
        num_there: Checkpoints of an earlier run that new ones will replace.
        has_state: With the optimizer's state.
    """

    name: str
    folder: str
    num_kept: int | None
    num_there: int = 0
    has_state: bool = True

    @property
    def num_new(self) -> int | None:
        """Checkpoints for which there must be room; None if there is no end to them."""
        return None if self.num_kept is None else max(0, self.num_kept - self.num_there)


@dataclass(frozen=True)
class CheckpointCost:
    """What the checkpoints of one callback need of their disk, in bytes.

    Attributes:
        keeper: The callback.
        linked_share: The share of the files that are links.
        each_nbytes: What each kept one takes.
        extra_nbytes: What one that is being copied takes before an older one goes.
    """

    keeper: SavingCallback
    linked_share: float
    each_nbytes: int
    extra_nbytes: int

    def num_fitting(self, room_nbytes: int) -> int:
        """How many kept ones find room."""
        return max(0, room_nbytes - self.extra_nbytes) // max(1, self.each_nbytes)


def prepare_checkpoints(session: Session, trainer: Any) -> list[str]:
    """Try a save wherever the Trainer's callbacks will save, and see whether there is room.

    Warns of directories whose checkpoints are copies, and if fewer fit than are to be kept.

    Returns:
        Lines that say what is kept where, and how many fit.

    Raises:
        CheckpointError: If a directory cannot be written.
        ConfigurationError: If a callback saves to a URL, or its path is too long.
        StoreError: If not one checkpoint fits.
    """
    keepers = find_saving_callbacks(trainer)
    stores = [path for path, _ in session.store.disks]
    shares = {folder: probe_save(folder, stores) for folder in dict.fromkeys(keeper.folder for keeper in keepers)}
    needs = [_need(session, keeper, shares[keeper.folder]) for keeper in keepers]
    disks: dict[int, list[CheckpointCost]] = {}
    for need in needs:
        disks.setdefault(device_of(_existing(need.keeper.folder)), []).append(need)
    for on_disk in disks.values():
        path = _existing(on_disk[0].keeper.folder)
        own = int(session.store.share_on(path) * session.sizing.disk_nbytes)
        _check(on_disk, free_nbytes(path), own)
    for folder, share in shares.items():
        if share == 0:
            most = max(need.each_nbytes for need in needs if need.keeper.folder == folder)
            _warn_of_copies(folder, stores, most)
    return [_line(session, need) for need in needs]


def find_saving_callbacks(trainer: Any) -> list[SavingCallback]:
    """The callbacks that will save during ``fit``, as far as their attributes tell.

    Raises:
        ConfigurationError: If one saves to a URL, or its path is too long.
    """
    found: list[SavingCallback] = []
    for callback in [] if trainer.fast_dev_run else trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        saves_nothing = getattr(callback, "save_top_k", None) == 0 and not _num_last(callback)
        if saves_nothing or not isinstance(folder, (str, os.PathLike)):
            continue
        name = type(callback).__name__
        where = os.path.abspath(home_path(folder, f"{name}: dirpath"))
        reason = too_long(where, INNER_NBYTES)
        if reason:
            raise ConfigurationError(f"{name}: dirpath={where!r} is too long: {reason}; choose a shorter one")
        has_state = not getattr(callback, "save_weights_only", False)
        num_there = _num_there(callback, trainer)
        found.append(SavingCallback(name, where, _num_kept(callback, trainer), num_there, has_state))
    return found


def _num_kept(callback: Any, trainer: Any) -> int | None:
    """0 for a callback that saves when the run ends: no step follows, for which a link would cost anything."""
    top = getattr(callback, "save_top_k", 0)
    at_end = (
        trainer.max_epochs == 1
        and not getattr(callback, "_every_n_train_steps", 0)
        and not getattr(callback, "_train_time_interval", None)
        and trainer.val_check_interval == 1.0
    )
    if at_end:
        return 0
    return None if top == -1 else top + _num_last(callback)


def _num_last(callback: Any) -> int:
    """Checkpoints of another step than the newest of the best that ``save_last`` keeps."""
    save_last, top = getattr(callback, "save_last", None), getattr(callback, "save_top_k", 0)
    if not save_last or top == -1 or (save_last == "link" and top != 0):
        return 0
    return int(top == 0 or callback.monitor is not None)  # without a monitor the best is the last


def _num_there(callback: Any, trainer: Any) -> int:
    """Checkpoints that a callback restored from a checkpoint will replace; it spares the one that is resumed from."""
    best = {*getattr(callback, "best_k_models", ()), getattr(callback, "best_model_path", "")}
    spared = os.path.abspath(trainer.ckpt_path) if trainer.ckpt_path else ""
    paths = {path for path in best if path and os.path.abspath(path) != spared}
    if _num_last(callback):
        paths.add(getattr(callback, "last_model_path", ""))
    return sum(bool(path) and is_checkpoint(path) for path in paths)


def _need(session: Session, keeper: SavingCallback, share: float) -> CheckpointCost:
    whole, changing = session.sizing.checkpoint_nbytes(with_state=keeper.has_state)
    copied = int((1 - share) * whole)
    return CheckpointCost(keeper, share, int(share * changing) + copied, copied)


def _check(needs: Sequence[CheckpointCost], free: int, own: int) -> None:
    """Compare what the callbacks on one disk keep with what the run leaves there.

    Args:
        needs: Of all callbacks that save to the disk.
        free: Bytes free there now.
        own: Bytes of them that the run itself is going to take.
    """
    room = free - own
    extra = max(need.extra_nbytes for need in needs)
    waiting = [need for need in needs if need.keeper.num_new != 0]
    wanted = sum((need.keeper.num_new or 1) * need.each_nbytes for need in waiting) + extra
    if wanted <= room or room < 0:  # a run that does not fit itself is refused when it starts
        return
    most = max(waiting or needs, key=lambda need: need.each_nbytes)
    numbers = (
        f"{_kept(need.keeper for need in needs)} in {most.keeper.folder!r} of up to "
        f"{fmt(max(most.each_nbytes, most.extra_nbytes))} each; {fmt(free)} are free there, of which the run itself "
        f"needs {fmt(own)}"
    )
    num = most.num_fitting(room)
    if num == 0:
        raise StoreError(
            f"not one checkpoint has room: {numbers}; free {fmt(wanted - room)}, choose another dirpath or nvme_path, "
            "or train without saving (enable_checkpointing=False)"
        )
    warnings.warn(
        f"room for {num} checkpoint(s) only: {numbers}; the run will end with a full disk when there are more, with "
        f"what is saved whole: free {fmt(wanted - room)}, keep fewer (save_top_k) or choose another dirpath",
        stacklevel=2,
    )


def _warn_of_copies(folder: str, stores: Sequence[str], nbytes: int) -> None:
    places = ", ".join(repr(os.path.dirname(store)) for store in stores)
    warnings.warn(
        f"checkpoints in {folder!r} cannot be hard links to the store in {places}: it is another file system, or has "
        f"none. Each save will write {fmt(nbytes)} while training waits; to save at no cost put dirpath and nvme_path "
        "on one file system, and use `lightning-ssd copy` for what shall go elsewhere",
        stacklevel=2,
    )


def _line(session: Session, need: CheckpointCost) -> str:
    keeper = need.keeper
    path = _existing(keeper.folder)
    room = free_nbytes(path) - int(session.store.share_on(path) * session.sizing.disk_nbytes)
    how = "links" if need.linked_share == 1 else "copies" if need.linked_share == 0 else "links and copies"
    size = f"{fmt(need.each_nbytes)} of {how} each"
    fitting = f", room for {need.num_fitting(room)}" if keeper.num_kept != 0 else ""
    return f"  checkpoints: {_kept([keeper])} in {keeper.folder}, {size}{fitting}"


def _kept(keepers: Iterable[SavingCallback]) -> str:
    words = {None: "keeps every one", 0: "saves when the run ends"}
    return ", ".join(f"{k.name} {words.get(k.num_kept, f'keeps {k.num_kept}')}" for k in keepers)


def _existing(path: str) -> str:
    """The deepest folder on the way to ``path`` that exists."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path
