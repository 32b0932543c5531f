"""The thread that runs pending updates.

[Note: queue] One thread takes, of the pending updates, the one whose unit compute needs soonest, and runs it. Whoever
wants a unit's values waits for its update (`PendingUpdate.wait`). An update waits for nothing but the disk: not for a
fetch, not for memory that parameters use, not for the thread that trains. So waiting for one always ends. During
backward gradients arrive one unit at a time, and updates overlap with the rest of backward. Where the step needs all
gradients first, such as for clipping by norm, the updates are submitted at the step and overlap with the next forward,
each before its unit is needed. The result is exact, since stale values are never read. Updates that overlap with
backward are those of Ratel, first published as Fuyou (arXiv 2403.06504).

[Note: one lock] Who has a unit (compute, an update, nobody) is guarded by one Condition, the lock of the `ModelUnits`.
Whoever changes it, such as a release that makes a unit idle or an update that is done, notifies that Condition.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from copy import copy

from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.memory.budget import SharedBudget
from lightning_ssd.optim.update import PendingUpdate, UpdateState
from lightning_ssd.trace.recorder import Lane, Trace


class Updater:
    """Runs updates in a thread of its own, soonest needed first.

    Args:
        lock: Guards who has a unit: that of the `ModelUnits`. Whoever changes it notifies.
        budget: Bounds the gradients of pending updates; `submit` waits while there are more.
        is_async: Without it, `submit` runs the update and returns when it is done.
        trace: Gets spans of waiting.
    """

    def __init__(self, *, lock: threading.Condition, budget: SharedBudget, is_async: bool, trace: Trace) -> None:
        self.lock = lock
        self._budget = budget
        self._is_async = is_async
        self._trace = trace
        self._submitted: list[PendingUpdate] = []  # those that are over are dropped now and then
        self._is_running = False
        self._num_blocked = 0  # callers who wait for an update: units that are not idle are updated too
        self._failure: BaseException | None = None
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def submit(self, update: PendingUpdate) -> None:
        """Run an update soon; an earlier one of the same unit is done first.

        Raises:
            BaseException: What an earlier update failed with.
        """
        try:
            update.unit.wait_for_update()
        except BaseException:
            update.cancel()
            raise
        if not self._is_async:
            update.run()
            update.finish()
            return
        with self.lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="lightning-ssd-update", daemon=True)
                self._thread.start()
            if self._failure is None:
                self._submitted = [*self._pending, update]
                update.unit.update = update
                self._budget.held_gradients_nbytes += update.nbytes
            else:  # just now
                update.cancel()
            self.lock.notify_all()
        self._wait("gradients of earlier units", self._has_room)

    def wait(self, update: PendingUpdate) -> None:
        """Return when ``update`` is done.

        Raises:
            BaseException: What an update failed with.
        """
        self._wait(update.unit.name, lambda: update.is_over, is_blocking=True)

    def drain(self) -> None:
        """Return when no update is pending.

        Raises:
            BaseException: What an update failed with.
        """
        if self._pending or self._failure is not None:
            self._wait("all updates", lambda: not self._pending, is_blocking=True)

    def settle(self) -> None:
        """Run what can run now, whatever the caller does next; not from the thread that runs updates."""
        if not self._pending or self._thread is threading.current_thread():
            return
        with self.lock:
            waited = self._pending
            self.lock.wait_for(lambda: not any(map(self._will_end, waited)))  # sync: updates

    def before_fork(self) -> list[str]:
        """Let no update begin or end until `after_fork`; returns the names of units of which one is pending."""
        self.lock.acquire()
        return [update.unit.name for update in self._pending]

    def after_fork(self) -> None:
        """Undo `before_fork`, in both processes."""
        self.lock.release()

    @property
    def is_broken(self) -> bool:
        """Whether an update failed: the step that it belongs to is half made."""
        return self._failure is not None

    def close(self) -> None:
        """End the thread after every pending update is done, or has failed."""
        with self.lock:
            self._is_closed = True
            self.lock.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def _pending(self) -> list[PendingUpdate]:
        return [update for update in self._submitted if not update.is_over]

    @property
    def _has_blocked_waiter(self) -> bool:
        return self._num_blocked > 0 or self._is_closed

    def _will_end(self, update: PendingUpdate) -> bool:
        """Whether ``update`` is pending and goes on without the thread that trains."""
        return not update.is_over and (update.state is UpdateState.WRITING or self._is_running or self._may_run(update))

    def _has_room(self) -> bool:
        # Units that are not idle become so only by what the caller does next: they do not keep it waiting.
        if not self._is_over_budget:
            return True
        return not self._is_running and not any(map(self._may_run, self._pending))

    def _may_run(self, update: PendingUpdate) -> bool:
        # An update waits for compute to be done with its unit only while there is room for its gradients.
        can_copy = not update.changes_memory and self._is_over_budget
        return update.state is UpdateState.QUEUED and (update.is_idle or can_copy)

    @property
    def _is_over_budget(self) -> bool:
        return self._budget.held_gradients_nbytes > self._budget.gradients_limit_nbytes

    def _wait(self, what: str, is_over: Callable[[], bool], *, is_blocking: bool = False) -> None:
        with self.lock:
            if self._failure is None and not is_over():
                self._num_blocked += is_blocking
                self.lock.notify_all()
                try:
                    with self._trace.span(Lane.WAIT, "wait for the update", what):
                        self.lock.wait_for(lambda: self._failure is not None or is_over())  # sync: an update
                finally:
                    self._num_blocked -= is_blocking
            if self._failure is not None:
                # A copy each time: autograd keeps what is raised inside backward, and every frame it went through.
                raise copy(self._failure) from self._failure

    def _work(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self._next() or (self._is_closed and not self._pending))
                update = self._next()
                if update is None:
                    return
                self._is_running = True
            failure = None
            try:
                if update.state is UpdateState.WRITING:
                    update.finish()  # there is nothing to read meanwhile
                    nbytes = 0
                else:
                    nbytes = update.nbytes
                    update.run()
            except BaseException as error:
                failure = error
                self._finish_others(update)
            with self.lock:
                self._is_running = False
                if failure is None:
                    self._budget.held_gradients_nbytes -= nbytes
                else:
                    self._fail(update, failure)
                update = None  # it does not live until the next one comes
                self.lock.notify_all()

    def _next(self) -> PendingUpdate | None:
        """The update to run now, else one that only has to be written, else None."""
        pending = self._pending
        queued = [update for update in pending if update.state is UpdateState.QUEUED]
        ready = queued if self._has_blocked_waiter else list(filter(self._may_run, queued))
        writing = (update for update in pending if update.state is UpdateState.WRITING)
        return min(ready, key=lambda update: update.position, default=next(writing, None))

    def _finish_others(self, failed: PendingUpdate) -> None:
        """Write what an update before ``failed`` computed: its unit is whole."""
        for update in self._pending:
            if update is not failed and update.state is UpdateState.WRITING:
                with suppress(SSDOffloadError):
                    update.finish()

    def _fail(self, failed: PendingUpdate, failure: BaseException) -> None:
        """The step cannot be completed any more: whoever waits is told."""
        self._failure = failure
        for update in self._pending:
            if update.state is UpdateState.QUEUED:
                update.cancel()
            else:
                update.fail()
        failed.fail()
        self._submitted = []
        self._budget.held_gradients_nbytes = 0
