"""How long a disk is waited for, and system calls that return within that time even if the disk hangs.

[Note: deadline] Only time in which this process runs counts. After SIGSTOP, or on a machine that was suspended, the
disk had no time to answer: one tick of a wait counts as at most a second, however long it took.

Once a wait has run out, the disk counts as hanging until that operation ends, and it is not waited for again. So an
error is raised one deadline after the disk stopped, whatever else would have waited for it, and teardown ends.

An operation that hangs in the kernel cannot be cancelled, only abandoned: a thread with its system call, a transfer
with its memory and descriptors. All such threads are daemons, so the process can end.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from lightning_ssd.errors import DeadlineError, as_io_failure

T = TypeVar("T")

TICK_S = 0.2
"""A wait returns to the interpreter this often, so that Ctrl-C works while the disk hangs."""

_MOST_PER_TICK_S = 5 * TICK_S
"""A tick that took longer, on a busy machine or while the process was stopped, counts as this."""


class InFlight(Protocol):
    """An operation of a disk, which may hang."""

    def done(self) -> bool:
        """Whether it is over."""
        ...

    def wait_for(self, seconds: float) -> bool:
        """Wait at most this long; returns `done`."""
        ...


class Over(threading.Event):
    """An `InFlight` that is over once `set` is called."""

    def done(self) -> bool:
        """See `InFlight.done`."""
        return self.is_set()

    def wait_for(self, seconds: float) -> bool:
        """See `InFlight.wait_for`."""
        return self.wait(seconds)


class Patience:
    """How long the disks of one engine are waited for; see [Note: deadline].

    Args:
        deadline_s: Seconds that a wait without a deadline of its own may take.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._overdue: InFlight | None = None
        self._idle: list[_Caller] = []
        self._is_closed = False

    @property
    def is_spent(self) -> bool:
        """Whether a wait has run out and its operation is still not over."""
        overdue = self._overdue
        return overdue is not None and not overdue.done()

    def wait(self, operation: InFlight, deadline_s: float | None = None) -> bool:
        """Wait for ``operation``.

        Args:
            operation: What to wait for.
            deadline_s: Seconds to wait at most. With None it is the disk's deadline, and once that has run out, the
                disk counts as hanging.

        Returns:
            Whether it is over.
        """
        left_s = self.deadline_s if deadline_s is None else deadline_s
        if self.is_spent:
            left_s = 0.0
        while True:
            begin_s = time.monotonic()
            asked_s = max(0.0, min(left_s, TICK_S))
            if operation.wait_for(asked_s):
                return True
            left_s -= max(asked_s, min(time.monotonic() - begin_s, _MOST_PER_TICK_S))
            if left_s <= 0:
                break
        if deadline_s is None and not self.is_spent:
            self._overdue = operation
        return operation.done()

    def call(self, call: Callable[[], T], path: str, what: str) -> T:
        """Make a system call on a disk, in a thread that is abandoned if it hangs.

        Args:
            call: Makes it.
            path: The file, for messages.
            what: The action, for messages.

        Returns:
            What ``call`` returns.

        Raises:
            IOFailure: It failed.
            DeadlineError: Time ran out, or the disk hangs already.
        """
        with as_io_failure(path, what=what):
            return self.run(call, path, what)

    def run(self, call: Callable[[], T], path: str, what: str) -> T:
        """As `call`, but raises what ``call`` raises."""
        return self.start(call, path, what).result()

    def start(self, call: Callable[[], T], path: str, what: str) -> Started[T]:
        """As `run`, without waiting: what the caller does meanwhile does not need it.

        Raises:
            DeadlineError: The disk hangs already.
        """
        self.require_answering(path, what)
        try:
            caller = self._idle_caller()
        except RuntimeError:  # the interpreter ends and starts no more threads
            caller = None
        return Started(self, caller, call, path, what)

    def give_back(self, caller: _Caller) -> None:
        """The call of ``caller`` is over."""
        if self._is_closed:
            caller.end()
        else:
            self._idle.append(caller)

    def close(self) -> None:
        """End the threads that wait for calls; from now on each call has a thread of its own."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().end()

    def require_answering(self, path: str, what: str) -> None:
        """Refuse to use a disk that hangs.

        Raises:
            DeadlineError: It does.
        """
        if self.is_spent:
            raise DeadlineError(errno.ETIMEDOUT, path, 0, 0, what)

    def _idle_caller(self) -> _Caller:
        """A thread that makes no call now; to start one for each call would take longer than most calls."""
        with suppress(IndexError):
            caller = self._idle.pop()
            if caller.pid == os.getpid():
                return caller
        return _Caller()


_patience: ContextVar[Patience] = ContextVar("patience")


@contextmanager
def within(patience: Patience) -> Iterator[None]:
    """Inside, and in copies of the context made inside, `in_time` and `sync` wait as long as ``patience`` does."""
    token = _patience.set(patience)
    try:
        yield
    finally:
        _patience.reset(token)


def in_time(call: Callable[[], T], path: str, what: str) -> T:
    """What ``call`` returns, a system call that changes a name or a file; `within` a patience it ends in time.

    Raises:
        OSError: As ``call`` does.
        DeadlineError: Time ran out.
    """
    patience = _patience.get(None)
    return call() if patience is None else patience.run(call, path, what)


def require_answering(path: str, what: str) -> None:
    """Inside `within`, refuse to use a disk that hangs; for calls that are too short to get a thread."""
    patience = _patience.get(None)
    if patience is not None:
        patience.require_answering(path, what)


def sync(fd: int, call: Callable[[int], None]) -> None:
    """``os.fsync`` or ``os.fdatasync`` of a descriptor; `within` a patience it ends in time.

    Raises:
        OSError: It failed, or time ran out.
    """
    patience = _patience.get(None)
    if patience is None:
        call(fd)
        return
    own = os.dup(fd)  # the caller may close ``fd`` while this call hangs

    def run() -> None:
        try:
            call(own)
        finally:
            os.close(own)

    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        path = f"descriptor {fd}"
    patience.call(run, path, "sync")


def leave_behind(thing: object) -> None:
    """Keep ``thing`` until the process ends: a transfer that hangs may still write to its memory."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class Started(Generic[T]):
    """A system call that was started by `Patience.start`.

    Args:
        patience: Waits for it.
        caller: Makes it; None makes it now.
        call: See `Patience.run`.
        path: See `Patience.run`.
        what: See `Patience.run`.
    """

    def __init__(self, patience: Patience, caller: _Caller | None, call: Callable[[], T], path: str, what: str) -> None:
        self._patience = patience
        self._caller = caller
        self._path = path
        self._what = what
        self._call: _Call[T] = _Call(call)
        if caller is None:
            self._call.run()
        else:
            caller.start(self._call)

    def done(self) -> bool:
        """See `InFlight.done`."""
        return self._call.over.done()

    def wait_for(self, seconds: float) -> bool:
        """See `InFlight.wait_for`."""
        return self._call.over.wait_for(seconds)

    def result(self) -> T:
        """What it returned, once it has; see `end`."""
        self.end()
        return self._call.result.pop()

    def end(self) -> None:
        """Return when it is over. What it raised is raised by the first call only.

        Raises:
            DeadlineError: Time ran out.
        """
        if not self._patience.wait(self):
            raise DeadlineError(errno.ETIMEDOUT, self._path, 0, 0, self._what)
        caller, self._caller = self._caller, None
        if caller is not None:
            self._patience.give_back(caller)
        error, self._call.error = self._call.error, None
        if error is not None:
            raise error


class _Call(Generic[T]):
    """A call that a `_Caller` makes."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.over = Over()
        self.result: list[T] = []
        self.error: BaseException | None = None
        self._call = [call]

    def run(self) -> None:
        """Make the call, and drop it before `over` is set: the caller does not keep what the call holds."""
        call = self._call.pop()
        try:
            self.result.append(call())
        except BaseException as error:
            self.error = error
        finally:
            del call
            self.over.set()


class _Caller:
    """A thread that makes one call after another. It ends with this object, unless a call hangs."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self.pid = os.getpid()
        self._thread = threading.Thread(target=_make_calls, args=(self._calls,), name="lightning-ssd-call", daemon=True)
        self._thread.start()

    def start(self, call: _Call[Any]) -> None:
        """Start a call; the one before is over."""
        self._calls.put(call)

    def end(self) -> None:
        """End the thread, which makes no call now, and wait until it is gone."""
        self._calls.put(None)
        if self.pid == os.getpid():
            self._thread.join()

    def __del__(self) -> None:
        self._calls.put(None)


def _make_calls(calls: SimpleQueue[_Call[Any] | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()
        del call  # else it would be kept until the next one
