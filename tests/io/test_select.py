"""Which engine is chosen, what is refused, and the stub of the native module."""

from __future__ import annotations

import ast
import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io import select
from lightning_ssd.io.engine import Engine, IOOptions, validate
from lightning_ssd.io.select import make_engine, native_is_built
from tests.helpers.io_engines import engine_or_skip


def chosen(options: IOOptions) -> Engine:
    engine = make_engine(options)
    engine.close()
    return engine


def refuse_uring(options: IOOptions, *, reason: str) -> Engine:
    raise OSError(errno.EPERM, "io_uring_setup: Operation not permitted")


@pytest.mark.parametrize("name", ["python", "posix", "uring"])
def test_an_engine_asked_for_by_name(name: str) -> None:
    engine_or_skip(name)
    assert chosen(IOOptions(engine=name)).name == name  # type: ignore[arg-type]


def test_without_io_uring(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that forbids it."""
    engine_or_skip("posix")
    monkeypatch.setattr(select, "make_uring_engine", refuse_uring)
    engine = chosen(IOOptions())
    assert engine.name == "posix"
    assert "not permitted" in engine.reason
    with pytest.raises(ConfigurationError, match="engine='uring'"):
        make_engine(IOOptions(engine="uring"))


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "native_is_built", lambda: False)
    engine = chosen(IOOptions())
    assert engine.name == "python"
    assert "native module" in engine.reason
    with pytest.raises(ConfigurationError, match="engine='posix'"):
        make_engine(IOOptions(engine="posix"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "aio"},
        {"depth": 0},
        {"num_threads": 0},
        {"direct": "yes"},
        {"deadline_s": 0},
        {"block_nbytes": "5KiB"},
        {"block_nbytes": 0},
        {"block_nbytes": "2GiB"},
        {"block_nbytes": "lots"},
    ],
    ids=str,
)
def test_a_wrong_option_is_named(wrong: dict[str, object]) -> None:
    options = IOOptions(**wrong)  # type: ignore[arg-type]  # building it never fails: the CLI does so to print it
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        validate(options)


def test_options_are_plain_values_and_need_no_torch(fresh_python: Callable[..., str]) -> None:
    assert IOOptions(**json.loads(json.dumps(dataclasses.asdict(IOOptions())))) == IOOptions()
    validate(IOOptions())
    code = "import sys, lightning_ssd.io.engine; print('torch' in sys.modules)"
    assert fresh_python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").strip() == "False"


def test_the_stub_is_of_this_native_module() -> None:
    """`lightning_ssd/_native.pyi` is generated: python -m nanobind.stubgen -m lightning_ssd._native -o <it>."""
    if not native_is_built():
        pytest.skip("the native module is not built")
    stubgen = pytest.importorskip("nanobind.stubgen")
    from lightning_ssd import _native

    generator = stubgen.StubGen(_native)
    generator.put(_native)
    stub = Path(select.__file__).parents[1] / "_native.pyi"
    assert ast.dump(ast.parse(stub.read_text())) == ast.dump(ast.parse(generator.get()))
