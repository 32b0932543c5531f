"""Every engine, in one list: a new one gets all conformance tests by adding a row. And aligned memory to use it on."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io.engine import Engine, IOOptions
from lightning_ssd.io.native_engines import make_posix_engine, make_uring_engine
from lightning_ssd.io.python_engine import PythonEngine
from lightning_ssd.io.select import make_engine, native_is_built
from lightning_ssd.sizes import round_up
from tests.benchmarks.bounds import Rates
from tests.benchmarks.paced import PacedEngine
from tests.helpers.docs import engine_of_the_docs
from tests.helpers.faulty import Fault, FaultyEngine, Operation

MakeEngine = Callable[[IOOptions], Engine]


def _delayed(options: IOOptions) -> Engine:
    """Every third operation late, so completions come out of order."""

    def rule(operation: Operation) -> Fault | None:
        return Fault(delay_s=0.002) if operation.index % 3 == 1 else None

    return FaultyEngine(PythonEngine(options), rule, deadline_s=options.deadline_s)


ENGINES: dict[str, MakeEngine] = {
    "python": PythonEngine,
    "posix": lambda options: make_posix_engine(options, reason="a test"),
    "uring": lambda options: make_uring_engine(options, reason="a test"),
    "faulty": _delayed,
    "paced": lambda options: PacedEngine(PythonEngine(options), Rates(read_gbps=0.1, write_gbps=0.1)),
    "docs": lambda options: engine_of_the_docs()(options),  # the example of docs/design/extending.md
}


def engine_or_skip(name: str) -> MakeEngine:
    """How to make the engine ``name``; skips the test where this machine has not got it."""
    if name in ("posix", "uring") and not native_is_built():
        pytest.skip("the native module is not built")
    if name == "uring":
        try:
            make_engine(IOOptions(engine="uring")).close()
        except ConfigurationError as error:
            pytest.skip(str(error))
    return ENGINES[name]


@contextmanager
def running(make: MakeEngine, options: IOOptions | None = None) -> Iterator[Engine]:
    """An engine with small pieces, closed afterwards."""
    engine = make(options or IOOptions(block_nbytes="16KiB", depth=4, num_threads=3, deadline_s=60))
    try:
        yield engine
    finally:
        engine.close()


class HostBuffer:
    """Zeroed page-aligned memory of at least ``nbytes``, rounded up to whole blocks; unmapped when nobody holds it."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, round_up(nbytes))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @classmethod
    def of(cls, data: bytes) -> HostBuffer:
        memory = cls(len(data))
        memory._map[: len(data)] = data
        return memory

    def bytes(self, nbytes: int) -> bytes:
        return self._map[:nbytes]
