"""Forked processes that a test asks, and that cannot outlive it or keep it waiting."""

from __future__ import annotations

import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any

DEADLINE_S = 30.0


class Child:
    """A fork of this process, which runs ``work`` when it is asked and ends at once; killed where it does not answer.

    Args:
        work: What it does; what this returns is pickled for `answer`, as is the text of an error.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        from_parent, self._to_child = os.pipe()
        self._from_child, to_parent = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._to_child)
                os.close(self._from_child)
                if os.read(from_parent, 1):
                    os.write(to_parent, pickle.dumps(_outcome(work)))
            finally:
                os._exit(0)
        os.close(from_parent)
        os.close(to_parent)

    def answer(self) -> Any:
        """Let it work, and wait for what it found."""
        try:
            os.write(self._to_child, b"!")
            found = b""
            while True:
                assert select.select([self._from_child], [], [], DEADLINE_S)[0], "the child hangs"
                piece = os.read(self._from_child, 1 << 16)
                if not piece:
                    break
                found += piece
        finally:
            os.kill(self._pid, signal.SIGKILL)
            status = os.waitpid(self._pid, 0)[1]
            os.close(self._to_child)
            os.close(self._from_child)
        assert found, f"the child died, status {status}"
        return pickle.loads(found)


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
