"""How long a disk is waited for, and calls to the system that end in time whatever the disk does.

[Note: deadline] Time counts while this process runs and waits. One that was stopped (SIGSTOP, a suspended machine) and
goes on finds a disk that has had no time to answer: a tick counts once, however long it took.

Once a wait has run out, the disk is taken to hang until that operation ends: nobody waits for it again. So an error is
shown one deadline after the disk stopped, whatever else would have waited for it, and teardown ends.

What hangs in the kernel cannot be ended, only left behind: a thread with its call, a transfer with its memory and its
descriptors. All of these are daemons, so the process can end.
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
from typing import Any, Generic, TypeVar

from lightning_ssd.errors import DeadlineError, as_io_failure

T = TypeVar("T")

TICK_S = 0.2
"""A wait returns to the interpreter this often, so that Ctrl-C is heard while the disk hangs."""

_MOST_PER_TICK_S = 5 * TICK_S
"""A tick that took longer, as on a busy machine or where the process was stopped, counts as that."""


class Patience:
    """How long one disk is waited for; see [Note: deadline].

    Args:
        deadline_s: Seconds that a wait without a deadline of its own may take.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._hangs: Callable[[], bool] = lambda: False
        self._idle: list[_Caller] = []
        self._is_closed = False

    @property
    def is_spent(self) -> bool:
        """Whether a wait has run out for what is still not over."""
        return self._hangs()

    def wait(
        self, wait_for: Callable[[float], bool], is_over: Callable[[], bool], deadline_s: float | None = None
    ) -> bool:
        """Call ``wait_for`` with a few seconds each time until it says that it is over; False if time runs out.

        Args:
            wait_for: Waits so many seconds at most and tells whether it is over.
            is_over: Tells it without waiting.
            deadline_s: Seconds to wait at most; None takes the disk's, and then running out tells that it hangs.
        """
        left_s = self.deadline_s if deadline_s is None else deadline_s
        if self.is_spent:
            left_s = 0.0
        while True:
            begin_s = time.monotonic()
            asked_s = max(0.0, min(left_s, TICK_S))
            if wait_for(asked_s):
                return True
            left_s -= max(asked_s, min(time.monotonic() - begin_s, _MOST_PER_TICK_S))
            if left_s <= 0:
                break
        if deadline_s is None and not self.is_spent:
            self._hangs = lambda: not is_over()
        return is_over()

    def call(self, call: Callable[[], T], path: str, what: str) -> T:
        """What ``call``, a system call on a disk, returns; it runs in a thread that is left behind if it hangs.

        Raises:
            IOFailure: It failed.
            DeadlineError: Time ran out, or the disk was seen to hang before.
        """
        with as_io_failure(path, what=what):
            return self.run(call, path, what)

    def run(self, call: Callable[[], T], path: str, what: str) -> T:
        """The same; what it fails with is raised as it is."""
        self.require_answering(path, what)
        try:
            caller = self._idle_caller()
        except RuntimeError:  # the interpreter ends and starts no more threads
            return call()
        running = caller.start(call)
        if not self.wait(running.over.wait, running.over.is_set):
            raise DeadlineError(errno.ETIMEDOUT, path, 0, 0, what)
        if self._is_closed:
            caller.end()
        else:
            self._idle.append(caller)
        return running.result()

    def close(self) -> None:
        """Threads that wait for calls end; from now on each call has its own."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().end()

    def _idle_caller(self) -> _Caller:
        """One that makes no call now: to start a thread for each would take longer than most calls."""
        with suppress(IndexError):
            caller = self._idle.pop()
            if caller.pid == os.getpid():
                return caller
        return _Caller()

    def require_answering(self, path: str, what: str) -> None:
        """Refuse to ask a disk that was seen to hang, and has not answered yet."""
        if self.is_spent:
            raise DeadlineError(errno.ETIMEDOUT, path, 0, 0, what)


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
    """What ``call``, which changes a name or a file, returns; inside `within` it ends in time.

    Raises:
        OSError: As ``call`` does.
        DeadlineError: It did not end.
    """
    patience = _patience.get(None)
    return call() if patience is None else patience.run(call, path, what)


def require_answering(path: str, what: str) -> None:
    """Inside `within`, refuse to ask a disk that was seen to hang; for what is too short to be watched itself."""
    patience = _patience.get(None)
    if patience is not None:
        patience.require_answering(path, what)


def sync(fd: int, call: Callable[[int], None]) -> None:
    """``os.fsync`` or ``os.fdatasync`` of a descriptor; inside `within` it ends in time.

    Raises:
        OSError: It failed, or did not end.
    """
    patience = _patience.get(None)
    if patience is None:
        call(fd)
        return
    own = os.dup(fd)  # the caller closes his while this one may still hang

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
    """Keep ``thing`` until the process ends: something that hangs may still write to its memory."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class _Call(Generic[T]):
    """A call that a caller makes."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.over = threading.Event()
        self._call: Callable[[], T] | None = call
        self._result: list[T] = []
        self._error: BaseException | None = None

    def result(self) -> T:
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result.pop()

    def run(self) -> None:
        assert self._call is not None
        try:
            self._result.append(self._call())
        except BaseException as error:
            self._error = error
        finally:
            self._call = None
            self.over.set()


class _Caller:
    """A thread that makes one call after another. It ends with this object, unless a call hangs."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self.pid = os.getpid()
        self._thread = threading.Thread(target=_make_calls, args=(self._calls,), name="lightning-ssd-call", daemon=True)
        self._thread.start()

    def start(self, call: Callable[[], T]) -> _Call[T]:
        started = _Call(call)
        self._calls.put(started)
        return started

    def end(self) -> None:
        """Return when the thread, which makes no call now, is gone."""
        self._calls.put(None)
        if self.pid == os.getpid():
            self._thread.join()

    def __del__(self) -> None:
        self._calls.put(None)


def _make_calls(calls: SimpleQueue[_Call[Any] | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()
        del call  # what it holds is not held until the next one
