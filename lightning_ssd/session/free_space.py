"""Free space for the Trainer's checkpoints: tried, counted and reported before the first step.

[Note: free space] Free space is checked, not reserved. A reservation would take (checkpoints kept) x (state) from other
users of the disk for hours, and would have to be handed over piece by piece while updates run. Without one, no
checkpoint is lost if others fill the disk: each file is reserved before it is written, and the run ends with an error.

A checkpoint of hard links costs nothing when it is saved. It costs its size from the next step on, when its files are
not recycled; frozen parameters are never written again and cost nothing. Such checkpoints need (number kept) x (bytes
that steps change). A checkpoint that must be copied costs its whole size at once, before an older one is removed:
(number kept + 1) x (all bytes).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ssd.checkpoint.directory import INNER_NBYTES
from lightning_ssd.errors import ConfigurationError, StoreError
from lightning_ssd.io.folder import device_of
from lightning_ssd.paths import home_path, is_url, too_long
from lightning_ssd.saving.probe_save import probe_save
from lightning_ssd.session.session import Session
from lightning_ssd.sizes import fmt
from lightning_ssd.store.disks import free_nbytes


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
        """Checkpoints that need free space; None if there is no limit to them."""
        return None if self.num_kept is None else max(0, self.num_kept - self.num_there)


@dataclass(frozen=True)
class CheckpointCost:
    """What the checkpoints of one callback take of their disk, in bytes.

    Attributes:
        callback: The callback that saves them.
        linked_share: Share of the bytes that are hard links, 0 to 1.
        each_nbytes: What each kept checkpoint takes.
        extra_nbytes: What a checkpoint that is being copied takes before an older one is removed.
    """

    callback: SavingCallback
    linked_share: float
    each_nbytes: int
    extra_nbytes: int

    def num_fitting(self, free_nbytes: int) -> int:
        """How many kept checkpoints fit."""
        return max(0, free_nbytes - self.extra_nbytes) // max(1, self.each_nbytes)


def prepare_checkpoints(session: Session, trainer: Any) -> list[str]:
    """Try a save wherever the Trainer's callbacks will save, and compare what they keep with the free space.

    Warns of directories whose checkpoints are copies, and if fewer fit than are to be kept.

    Returns:
        Lines that say what is kept where, and how many fit.

    Raises:
        CheckpointError: If a directory cannot be written.
        ConfigurationError: If the path of a callback is too long.
        StoreError: If not one checkpoint fits.
    """
    callbacks = find_saving_callbacks(trainer)
    stores = [disk.path for disk in session.store.disks.all]
    shares = {folder: probe_save(folder, stores) for folder in dict.fromkeys(each.folder for each in callbacks)}
    is_linked = not session.sizing.saves_files
    if not is_linked:
        shares = dict.fromkeys(shares, 0.0)
    costs = [_cost(session, callback, shares[callback.folder]) for callback in callbacks]
    disks: dict[int, list[CheckpointCost]] = {}
    for cost in costs:
        disks.setdefault(device_of(_existing(cost.callback.folder)), []).append(cost)
    for on_disk in disks.values():
        path = _existing(on_disk[0].callback.folder)
        _check(on_disk, free_nbytes(path), _own_nbytes(session, path))
    for folder, share in shares.items():
        if share == 0 and is_linked:
            _warn_of_copies(folder, stores, max(c.each_nbytes for c in costs if c.callback.folder == folder))
    return [_form_line(session), *(_line(session, cost) for cost in costs)]


def find_saving_callbacks(trainer: Any) -> list[SavingCallback]:
    """The callbacks that will save to a disk during ``fit``, as far as their attributes tell.

    Raises:
        ConfigurationError: If its path is too long.
    """
    found: list[SavingCallback] = []
    for callback in [] if trainer.fast_dev_run else trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        saves_nothing = getattr(callback, "save_top_k", None) == 0 and not _num_last(callback)
        if saves_nothing or not isinstance(folder, (str, os.PathLike)) or is_url(folder):
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
    """Checkpoints kept while steps follow: 0 if the callback saves once, at the end; None if it keeps all."""
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
    """1 if ``save_last`` keeps a checkpoint of a step that is not among the best, else 0."""
    save_last, top = getattr(callback, "save_last", None), getattr(callback, "save_top_k", 0)
    if not save_last or top == -1 or (save_last == "link" and top != 0):
        return 0
    return int(top == 0 or callback.monitor is not None)  # without a monitor the best is the last


def _num_there(callback: Any, trainer: Any) -> int:
    """Checkpoints of an earlier run that the callback will replace: all but the one that is resumed from."""
    best = {*getattr(callback, "best_k_models", ()), getattr(callback, "best_model_path", "")}
    spared = os.path.abspath(trainer.ckpt_path) if trainer.ckpt_path else ""
    paths = {path for path in best if path and os.path.abspath(path) != spared}
    if _num_last(callback):
        paths.add(getattr(callback, "last_model_path", ""))
    return sum(bool(path) and os.path.exists(path) for path in paths)


def _cost(session: Session, callback: SavingCallback, linked_share: float) -> CheckpointCost:
    whole, changing = session.sizing.checkpoint_nbytes(with_state=callback.has_state)
    copied = int((1 - linked_share) * whole)
    return CheckpointCost(callback, linked_share, int(linked_share * changing) + copied, copied)


def _own_nbytes(session: Session, path: str) -> int:
    """Bytes that the run itself is still going to take on the disk of ``path``."""
    return int(session.store.disks.share_on(path) * session.sizing.disk_nbytes)


def _check(costs: Sequence[CheckpointCost], free: int, own: int) -> None:
    """Compare what the callbacks on one disk keep with what the run leaves there.

    Args:
        costs: Of all callbacks that save to the disk.
        free: Bytes free there now.
        own: Bytes of them that the run itself is going to take.
    """
    left = free - own
    extra = max(cost.extra_nbytes for cost in costs)
    growing = [cost for cost in costs if cost.callback.num_new != 0]
    wanted = sum((cost.callback.num_new or 1) * cost.each_nbytes for cost in growing) + extra
    if wanted <= left or left < 0:  # a run that does not fit itself is refused when it starts
        return
    most = max(growing or costs, key=lambda cost: cost.each_nbytes)
    numbers = (
        f"{_kept(cost.callback for cost in costs)} in {most.callback.folder!r} of up to "
        f"{fmt(max(most.each_nbytes, most.extra_nbytes))} each; {fmt(free)} are free there, of which the run itself "
        f"needs {fmt(own)}"
    )
    num = most.num_fitting(left)
    if num == 0:
        raise StoreError(
            f"not one checkpoint has room: {numbers}; free {fmt(wanted - left)}, choose another dirpath or nvme_path, "
            "or train without saving (enable_checkpointing=False)"
        )
    warnings.warn(
        f"room for {num} checkpoint(s) only: {numbers}; with more the disk is full, and the run ends with the "
        f"checkpoints it has: free {fmt(wanted - left)}, keep fewer (save_top_k) or choose another dirpath",
        stacklevel=2,
    )


def _warn_of_copies(folder: str, stores: Sequence[str], nbytes: int) -> None:
    places = ", ".join(repr(os.path.dirname(store)) for store in stores)
    warnings.warn(
        f"checkpoints in {folder!r} cannot be hard links to the store in {places}: it is another file system, or has "
        f"none. Each save will write {fmt(nbytes)} while training waits; to save at no cost put dirpath and nvme_path "
        "on one file system, and copy what you want elsewhere with `lightning-ssd copy`",
        stacklevel=2,
    )


def _form_line(session: Session) -> str:
    how = "one file" if session.sizing.saves_files else "a small file and a folder of hard links"
    size = fmt(session.sizing.checkpoint_nbytes(with_state=True)[0])
    return f"  a checkpoint is {how} (checkpoint={session.settings.checkpoint!r}, {size} of parameters and state)"


def _line(session: Session, cost: CheckpointCost) -> str:
    callback = cost.callback
    path = _existing(callback.folder)
    how = {1.0: "links", 0.0: "copies"}.get(cost.linked_share, "links and copies")
    if session.sizing.saves_files:
        how = "one file"
    left = free_nbytes(path) - _own_nbytes(session, path)
    fitting = f", room for {cost.num_fitting(left)}" if callback.num_kept != 0 else ""
    return f"  checkpoints: {_kept([callback])} in {callback.folder}, {fmt(cost.each_nbytes)} of {how} each{fitting}"


def _kept(callbacks: Iterable[SavingCallback]) -> str:
    words = {None: "keeps every one", 0: "saves when the run ends"}
    return ", ".join(f"{each.name} {words.get(each.num_kept, f'keeps {each.num_kept}')}" for each in callbacks)


def _existing(path: str) -> str:
    """The deepest folder on the way to ``path`` that exists."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path
