"""What a session does when its process is forked; [Note: inherited] says what the child has of it.

Just before a fork pending updates are run, so that a child sees the values that plain Lightning has then. That is not
possible while a backward updates units, or in the thread that updates: then an access in the child is an error that
says so. A fork costs this, and a little for each unit; a step costs nothing.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_ssd.memory.plan_pools import OFF_HOST

if TYPE_CHECKING:
    from lightning_ssd.session.session import Session

_IS_UPDATING = (
    "this process was forked inside the backward of a step, which updates units as their gradients become "
    "complete; fork before or after the step, or set overlap='off' in the strategy"
)
_IS_PENDING = "its update was still to be made when this process was forked; fork before or after the step"
_IS_BROKEN = "an update had failed when this process was forked, so that its values were of no step"


class Forking:
    """Handles forks of the process, as long as its session exists.

    Args:
        session: What a forked process inherits.
    """

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._releases: list[Callable[[], None]] = []  # of the locks that are held during the fork
        self._passed_on: list[tuple[int, int]] = []
        self._refusals: dict[str, str] = {}
        self._lacks_in_memory = ""  # why in-memory parameters were not passed on
        # Cannot be undone: without the session, each fork still costs a look at a dead reference.
        os.register_at_fork(before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child)

    def _before(self) -> None:
        session = self._session()
        if session is None or session.is_inherited:
            return
        runtime = session.runtime
        if runtime is not None and not runtime.is_updating:
            runtime.updater.settle()
        self._refusals = dict.fromkeys((unit.name for unit in session.units), _IS_PENDING)  # should something fail
        self._passed_on, self._lacks_in_memory = [], OFF_HOST
        pending = self._hold_still(session)
        session.store.pass_on("param")
        self._refusals = self._find_refusals(session, pending)
        if runtime is not None:
            self._passed_on, self._lacks_in_memory = runtime.pools.pass_on()

    def _hold_still(self, session: Session) -> list[str]:
        """Let no other thread change what the child will see; returns the units of which an update is pending."""
        pending: list[str] = []
        session.model.before_fork()
        self._releases.append(session.model.after_fork)
        if session.runtime is not None:
            pending = session.runtime.updater.before_fork()
            self._releases.append(session.runtime.updater.after_fork)
        return pending

    def _find_refusals(self, session: Session, pending: list[str]) -> dict[str, str]:
        names = [unit.name for unit in session.units]
        if session.runtime is not None and session.runtime.updater.is_broken:
            return dict.fromkeys(names, _IS_BROKEN)
        if session.runtime is not None and session.runtime.is_updating:
            return dict.fromkeys(names, _IS_UPDATING)
        return dict.fromkeys(pending, _IS_PENDING)

    def _in_parent(self) -> None:
        session = self._session()
        if session is not None and not session.is_inherited and session.runtime is not None:
            session.runtime.pools.withhold()
        self._release()

    def _in_child(self) -> None:
        self._release()
        session = self._session()
        if session is None or session.is_inherited:
            return
        refusals = self._refusals
        if self._lacks_in_memory:
            lost = [unit.name for unit in session.units if unit.in_memory is not None]
            refusals = {**dict.fromkeys(lost, self._lacks_in_memory), **refusals}
        session.inherit(refusals, self._passed_on, has_in_memory=not self._lacks_in_memory)

    def _release(self) -> None:
        while self._releases:
            self._releases.pop()()
