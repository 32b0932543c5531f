"""The update queue: units whose gradients are complete and whose update is still owed.

[Note: queue] One thread takes the owed unit that compute needs soonest and updates it. Whoever wants a unit's values
waits for its update (`Updater.wait`). An update waits for nothing but the disk: not for a fetch, not for memory
that parameters use, not for the thread that trains. So waiting for one always ends. During backward gradients arrive
one unit at a time (Ratel, arXiv 2403.06504, updates so); after a gate, such as clipping by norm, all arrive at the step
and the updates run under the next forward, each before its unit is needed: exact, since nothing stale is ever read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass

from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.memory.budget import SharedBudget
from lightning_ssd.trace.recorder import Lane, Trace
from lightning_ssd.units.unit import Unit


@dataclass
class PendingUpdate:
    """One update that is still to run.

    Attributes:
        unit: What it updates.
        nbytes: Memory of its gradients that nobody else holds.
        position: Place of the unit in the next forward; the lowest is updated first.
        is_kept: The unit's values are only in memory, and must not change there while it is not free.
        is_free: Whether the update may change the unit where it is in memory: not under compute. One that is not kept
            can be updated beside that too, which costs a copy of its values.
        run: Runs it. The last bytes may still be on their way to the disk when it returns: `Updater.complete` is
            called when they are there, in the next one's `run` or in ``finish``.
        cancel: Called instead of `run` if an earlier update fails: lets go of what was borrowed for it.
        has_run: It waits for the disk only, and holds no gradients.
    """

    unit: Unit
    nbytes: int
    position: int
    is_kept: bool
    is_free: Callable[[], bool]
    run: Callable[[], None]
    cancel: Callable[[], None]
    has_run: bool = False


class Updater:
    """Runs updates in a thread of its own, soonest needed first.

    Args:
        budget: Bounds the gradients that wait; `add` waits while there are more.
        is_async: Without it, `add` runs the update and returns when it is complete.
        finish: Returns when every update that has run is complete.
        trace: Gets spans of waiting.
    """

    def __init__(self, *, budget: SharedBudget, is_async: bool, finish: Callable[[], None], trace: Trace) -> None:
        self._budget = budget
        self._is_async = is_async
        self._finish = finish
        self._trace = trace
        self._changed = threading.Condition()
        self._owed: dict[str, PendingUpdate] = {}  # by unit, until they are complete
        self._is_working = False
        self._num_blocked = 0  # callers for whom even a unit that is not free is updated
        self._failure: BaseException | None = None
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def add(self, owed: PendingUpdate) -> None:
        """Owe an update; an earlier one of the same unit is done first.

        Raises:
            BaseException: What an earlier update failed with.
        """
        try:
            self.wait(owed.unit)
        except BaseException:
            owed.cancel()
            raise
        if not self._is_async:
            owed.run()
            self._finish()
            return
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="lightning-ssd-update", daemon=True)
                self._thread.start()
            self._owed[owed.unit.name] = owed
            self._budget.held_gradients_nbytes += owed.nbytes
            self._changed.notify_all()
        self._wait("gradients of earlier units", self._has_room)

    def wait(self, unit: Unit) -> None:
        """Return when no update of ``unit`` is owed.

        Raises:
            BaseException: What an update failed with.
        """
        if self._owed or self._failure is not None:
            self._wait(unit.name, lambda: unit.name not in self._owed, is_blocking=True)

    def complete(self, unit: Unit) -> None:
        """The update of ``unit`` that has run is on disk, and its values are the current ones."""
        with self._changed:
            self._owed.pop(unit.name, None)
            self._changed.notify_all()

    def is_pending(self, unit: Unit) -> bool:
        """Whether an update of ``unit`` is not complete."""
        return unit.name in self._owed

    def drain(self) -> None:
        """Return when nothing is owed.

        Raises:
            BaseException: What an update failed with.
        """
        if self._owed or self._failure is not None:
            self._wait("all updates", lambda: not self._owed, is_blocking=True)

    def settle(self) -> None:
        """Run what can be run now, whatever the caller does next; not from the thread that runs it."""
        if not self._owed or self._thread is threading.current_thread():
            return
        with self._changed:
            waited = list(self._owed.values())
            self._changed.wait_for(lambda: not any(map(self._will_end, waited)))  # sync: updates

    def _will_end(self, owed: PendingUpdate) -> bool:
        is_pending = self._owed.get(owed.unit.name) is owed
        return is_pending and (owed.has_run or self._is_working or self._may_run(owed))

    def before_fork(self) -> list[str]:
        """Let nothing be owed or complete until `after_fork`; returns the units of which an update is owed."""
        self._changed.acquire()
        return list(self._owed)

    def after_fork(self) -> None:
        """Undo `before_fork`, in both processes."""
        self._changed.release()

    @property
    def is_broken(self) -> bool:
        """Whether an update failed: the step that it belongs to is half made."""
        return self._failure is not None

    def notify(self) -> None:
        """A unit may be free now."""
        if self._owed:
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        """End the thread after what is owed is done, or has failed."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _has_room(self) -> bool:
        # Units that are not free become so only by what the caller does next: they do not keep it waiting.
        if not self._is_over_budget:
            return True
        return not self._is_working and not any(map(self._may_run, self._owed.values()))

    def _may_run(self, owed: PendingUpdate) -> bool:
        # What waits for compute to be done with it does so only as long as its gradients are in nobody's way.
        return not owed.has_run and (owed.is_free() or (not owed.is_kept and self._is_over_budget))

    @property
    def _is_over_budget(self) -> bool:
        return self._budget.held_gradients_nbytes > self._budget.gradients_limit_nbytes

    def _wait(self, what: str, is_over: Callable[[], bool], *, is_blocking: bool = False) -> None:
        with self._changed:
            if self._failure is None and not is_over():
                self._num_blocked += is_blocking
                self._changed.notify_all()
                try:
                    with self._trace.span(Lane.WAIT, "wait for the update", what):
                        self._changed.wait_for(lambda: self._failure is not None or is_over())  # sync: an update
                finally:
                    self._num_blocked -= is_blocking
            if self._failure is not None:
                # A copy each time: autograd keeps what is raised inside backward, and every frame it went through.
                raise copy(self._failure) from self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next() or self._trails() or (self._is_closed and not self._owed))
                owed = self._next()
                if owed is None and not self._owed:
                    return
                self._is_working = True
            failure = None
            try:
                if owed is None:
                    self._finish()  # there is nothing to read meanwhile
                else:
                    owed.run()
            except BaseException as error:
                failure = error
                with suppress(SSDOffloadError):
                    self._finish()  # of another unit: it is whole
            left: list[PendingUpdate] = []
            with self._changed:
                self._is_working = False
                if failure is not None:  # the step cannot be completed any more: whoever waits is told
                    self._failure = failure
                    left = [other for other in self._owed.values() if not other.has_run and other is not owed]
                    self._owed.clear()
                    self._budget.held_gradients_nbytes = 0
                elif owed is not None:
                    self._budget.held_gradients_nbytes -= owed.nbytes
                    owed.has_run, owed.run = True, _has_run
                owed = None  # its gradients go now, not with the next update
                self._changed.notify_all()
            while left:  # not under the lock: residents, which take another one, notify us under theirs
                left.pop().cancel()

    def _trails(self) -> bool:
        return any(owed.has_run for owed in self._owed.values())

    def _next(self) -> PendingUpdate | None:
        is_blocking = self._num_blocked > 0 or self._is_closed
        found = [owed for owed in self._owed.values() if self._may_run(owed) or (is_blocking and not owed.has_run)]
        return min(found, key=lambda owed: owed.position, default=None)


def _has_run() -> None:
    raise AssertionError("an update ran twice")
