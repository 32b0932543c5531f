"""What a session does when its process is forked; [Note: inherited] says what the child has of it.

Just before the fork pending updates are run, so that a child sees the values that plain Lightning has then. That cannot
be waited for while a backward updates what it is done with, or from the thread that updates: then the child is told so
when it looks. A fork costs this, and a little for each unit; a step costs nothing.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_ssd.memory.limits import available_nbytes
from lightning_ssd.sizes import fmt

if TYPE_CHECKING:
    from lightning_ssd.strategy.session import Session

_IS_UPDATING = (
    "this process was forked inside the backward of a step, which updates parameters as it is done with them; fork "
    "before or after the step, or set overlap='off' in the strategy"
)
_IS_PENDING = "its update was still to be made when this process was forked; fork before or after the step"
_IS_BROKEN = "an update had failed when this process was forked, and the model was of no step"
_OFF_HOST = (
    "it is kept in memory that is registered with the device, of which a forked process has nothing; read it before "
    "the fork, or start the process another way (multiprocessing_context='spawn')"
)


class Forking:
    """Watches for forks as long as its session lives.

    Args:
        session: What the fork finds.
    """

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._releases: list[Callable[[], None]] = []  # of locks that the fork waited for
        self._passed_on: list[tuple[int, int]] = []
        self._refusals: dict[str, str] = {}
        self._lacks_kept = ""  # why parameters that are kept were not passed on
        # Cannot be undone: afterwards it costs a look whether the session lives.
        os.register_at_fork(before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child)

    def _before(self) -> None:
        session = self._session()
        if session is None or session.is_inherited:
            return
        runtime = session.runtime
        if runtime is not None and not runtime.is_updating:
            runtime.updater.settle()
        self._refusals = dict.fromkeys((unit.name for unit in session.units), _IS_PENDING)  # should something fail
        self._lacks_kept = _OFF_HOST
        pending = self._hold_still(session)
        session.store.pass_on("param")
        self._refusals = self._find_refusals(session, pending)
        self._lacks_kept = self._pass_on_memory(session)

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

    def _pass_on_memory(self, session: Session) -> str:
        """Let the child have parameters that are in memory; returns why it cannot have those that are kept."""
        pools = None if session.runtime is None else session.runtime.pools
        self._passed_on = [] if pools is None else pools.params.pass_on()
        kept = None if pools is None else pools.in_memory_params
        if kept is None:
            return _OFF_HOST
        # What the next update changes exists twice then, as long as the child lives. Its memory is not in the plan.
        available = available_nbytes()
        if available < kept.nbytes:
            return (
                f"parameters that are kept in memory take {fmt(kept.nbytes)} once more when they change while a forked "
                f"process has them, and {fmt(available)} were left at the fork; lower host_memory"
            )
        kept.pass_on()
        return ""

    def _in_parent(self) -> None:
        session = self._session()
        if session is not None and not session.is_inherited:
            pools = None if session.runtime is None else session.runtime.pools
            for pool in () if pools is None else (pools.params, pools.in_memory_params):
                if pool is not None:
                    pool.withhold()
        self._let_go()

    def _in_child(self) -> None:
        self._let_go()
        session = self._session()
        if session is None or session.is_inherited:
            return
        refusals = self._refusals
        if self._lacks_kept:
            kept = [unit.name for unit in session.units if unit.in_memory is not None]
            refusals = {**dict.fromkeys(kept, self._lacks_kept), **refusals}
        session.inherit(refusals, self._passed_on, has_kept=not self._lacks_kept)

    def _let_go(self) -> None:
        while self._releases:
            self._releases.pop()()
