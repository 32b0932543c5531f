"""``torch.cuda`` on the simulated device: import this before torch, then ``"cuda"`` is a device as any other."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.simulated_cuda import POLICIES
from tests.simulated_cuda.build import MODULE

CAPACITY_NBYTES = int(os.environ.get("SIMULATED_CUDA_NBYTES", 4 << 30))
CYCLES_PER_S = 2e9  # of `torch.cuda._sleep`
PROGRESS = 0.1  # probability that some queued work runs when more is queued


def _load() -> Any:
    if "torch" in sys.modules:
        raise RuntimeError("import tests.simulated_cuda.device before torch, which asks for CUDA's hooks only once")
    spec = importlib.util.spec_from_file_location("_simulated_cuda", MODULE)
    if spec is None or spec.loader is None or not MODULE.exists():
        raise RuntimeError(f"{MODULE} is not built: run python -m tests.simulated_cuda.build")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


core = _load()

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  imported later, it would ask CUDA for more than there is


class Event(core.Event):  # type: ignore[misc, name-defined]
    """See `torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        super().__init__()
        self.blocking = blocking

    def record(self, stream: torch.Stream | None = None) -> None:
        """See `torch.cuda.Event.record`."""
        self._record(_id_of(stream))

    def wait(self, stream: torch.Stream | None = None) -> None:
        """See `torch.cuda.Event.wait`."""
        self._wait(_id_of(stream))

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds to ``end``, where the device takes time; else one, whatever happened."""
        return (end.done_at() - self.done_at()) * 1e3 if end.done_at() else 1.0


class Stream(torch.Stream):
    """See `torch.cuda.Stream`."""

    def __new__(cls, device: Any = None, priority: int = 0, *, stream_id: int | None = None, **_: Any) -> Stream:
        stream_id = core.next_stream() if stream_id is None else stream_id
        return super().__new__(cls, stream_id=stream_id, device_index=0, device_type=1)  # type: ignore[call-overload]

    @property
    def cuda_stream(self) -> int:
        """Its number."""
        return self.stream_id

    def record_event(self, event: Event | None = None) -> Event:  # type: ignore[override]
        """See `torch.cuda.Stream.record_event`."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:  # type: ignore[override]
        """See `torch.cuda.Stream.wait_event`."""
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:  # type: ignore[override]
        """See `torch.cuda.Stream.wait_stream`."""
        self.wait_event(stream.record_event())

    def query(self) -> bool:
        """See `torch.cuda.Stream.query`."""
        return bool(core.is_idle(self.stream_id))

    def synchronize(self) -> None:
        """See `torch.cuda.Stream.synchronize`."""
        core.synchronize_stream(self.stream_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, torch.Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


def _id_of(stream: torch.Stream | None) -> int:
    return int(core.current_stream()) if stream is None else stream.stream_id


@contextlib.contextmanager
def _stream(stream: torch.Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    before = core.exchange_current_stream(stream.stream_id)
    try:
        yield
    finally:
        core.exchange_current_stream(before)


class _Device(contextlib.nullcontext[None]):
    def __init__(self, *_: Any) -> None:
        super().__init__()


class _Cudart:
    @staticmethod
    def cudaHostRegister(address: int, nbytes: int, flags: int) -> int:
        return int(core.register_host(address, nbytes))

    @staticmethod
    def cudaHostUnregister(address: int) -> int:
        return int(core.unregister_host(address))


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _of_memory(name: str) -> Callable[..., int]:
    return lambda device=None: int(getattr(core.memory_stats(), name))


def _replacements() -> dict[str, Any]:
    """What stands in for functions of `torch.cuda`, by their names."""
    properties = types.SimpleNamespace(
        name="simulated", total_memory=CAPACITY_NBYTES, major=9, minor=0, multi_processor_count=1, is_integrated=False
    )
    return {
        "_lazy_init": _always(None),
        "_lazy_call": lambda function, **_: function(),
        "init": _always(None),
        "is_initialized": _always(True),
        "_is_in_bad_fork": _always(False),
        "is_available": _always(True),
        "_is_compiled": _always(True),
        "device_count": _always(1),
        "current_device": _always(0),
        "set_device": _always(None),
        "device": _Device,
        "_exchange_device": _always(0),
        "_maybe_exchange_device": _always(0),
        "get_device_properties": _always(properties),
        "get_device_name": _always("simulated"),
        "get_device_capability": _always((9, 0)),
        "is_bf16_supported": _always(True),
        "Stream": Stream,
        "Event": Event,
        "stream": _stream,
        "current_stream": lambda device=None: Stream(stream_id=core.current_stream()),
        "default_stream": lambda device=None: Stream(stream_id=0),
        "set_stream": lambda stream: core.exchange_current_stream(stream.stream_id),
        "synchronize": lambda device=None: core.synchronize_device(),
        "cudart": _Cudart,
        "default_generators": (torch.Generator("cuda"),),
        "empty_cache": _always(None),
        "memory_allocated": _of_memory("allocated"),
        "max_memory_allocated": _of_memory("peak_allocated"),
        "memory_reserved": _of_memory("reserved"),
        "max_memory_reserved": _of_memory("peak_reserved"),
        "reset_peak_memory_stats": lambda device=None: core.reset_peak_memory(),
        "mem_get_info": lambda device=None: (CAPACITY_NBYTES - core.memory_stats().reserved, CAPACITY_NBYTES),
        "memory_stats": lambda device=None: {},
        "set_per_process_memory_fraction": _always(None),
        "_sleep": lambda cycles: core.sleep(cycles / CYCLES_PER_S),
        "is_current_stream_capturing": _always(False),
    }


def _make_storage(cls: type[torch.UntypedStorage], *args: Any, device: Any = None, **kwargs: Any) -> Any:
    """`torch.UntypedStorage`, which a torch without CUDA does not make there; for copies and files."""
    if device is None or torch.device(device).type != "cuda":
        return _make_stock_storage(cls, *args, **({} if device is None else {"device": device}), **kwargs)
    return torch.empty(args[0], dtype=torch.uint8, device="cuda").untyped_storage()


_make_stock_storage = torch.UntypedStorage.__new__


def _install() -> None:
    core.set_capacity(CAPACITY_NBYTES)
    core.init()
    replacements = _replacements()
    for module in (torch.cuda, torch.cuda.random, torch.cuda.memory, torch.cuda.streams):
        for name, value in replacements.items():
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, value)
    torch.UntypedStorage.__new__ = staticmethod(_make_storage)  # type: ignore[method-assign, assignment]
    torch.cuda._initialized = True  # asked by torch.utils.checkpoint
    torch.backends.cuda.is_built = _always(True)
    torch._C._cuda_clearCublasWorkspaces = _always(None)  # type: ignore[attr-defined]
    torch._C._cuda_getDeviceCount = _always(1)


_install()


def begin(seed: int, policy: str = POLICIES[0], progress: float = PROGRESS) -> None:
    """Forget what was reported; from now on work is done in an order drawn from ``seed``."""
    core.clear_report()
    core.configure(seed, POLICIES.index(policy), progress)


class Rates(NamedTuple):
    """How fast a device that takes time is.

    Attributes:
        operations: Of matrix products in a second, two for each product of two numbers.
        memory: Bytes that kernels read and write in a second; each takes the longer of both.
        pinned: Bytes of copies from and to pinned host memory in a second, each way.
        pageable: The same of other host memory; the host waits for these.
        launch: Seconds that every kernel and copy takes at least.
    """

    operations: float
    memory: float
    pinned: float
    pageable: float
    launch: float = 4e-6


@contextlib.contextmanager
def takes_time(rates: Rates, *, has_values: bool = True) -> Iterator[None]:
    """Kernels and copies take the time that they cost, in which no core is used: the host may do something else.

    With ``has_values`` it also does their work, when it waits for them; without it they are only waited for, values are
    zeros, and memory of the device is taken in name only.
    """
    core.begin_timing(*rates, has_values=has_values)
    try:
        yield
    finally:
        core.end_timing()
