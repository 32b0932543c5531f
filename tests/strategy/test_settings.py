"""Each option alone: what it may be, what is said where it may not, and what it comes to on a machine."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import lightning_ssd
from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.kernels import api as kernels
from lightning_ssd.memory.limits import available_nbytes
from lightning_ssd.session.settings import Options, Settings, argument_docs
from lightning_ssd.strategy.strategy import StrategyMixin


def is_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


VALID: dict[str, list[Any]] = {
    "nvme_path": [None, "/a", Path("/a"), b"/a", ["/a", Path("/b")], ("/a",)],
    "host_memory": ["auto", "min", 0, 1 << 40, "16GiB", "1.5 MB", "0"],
    "device_memory": ["auto", 1 << 30, "8GiB"],
    "units": ["auto", "Block", ["Block", "Head"], ("Block",), is_linear],
    "min_unit_numel": [0, 1_000_000],
    "activations": ["auto", "recompute", "keep"],
    "overlap": ["auto", "off"],
    "update": ["auto", "native", "torch"],
    "state": ["fp32"],
    "master": ["auto", "param", "fp32"],
    "window": ["auto", 1, 7],
    "prefetch_batch": ["auto", 1, 7],
    "verify_reads": ["auto", True, False],
    "io": [IOOptions(), IOOptions(depth=3)],
    "keep_store": [True, False],
    "checkpoint": ["auto", "file", "links"],
}
_SIZE = "write bytes as an int, or e.g. '16GiB' or '500MB'; or"
INVALID: dict[str, list[tuple[Any, str]]] = {
    "nvme_path": [
        (value, f"nvme_path={value!r} is unknown; it may be a directory or a list with one per disk")
        for value in (7, [], [7], ["/a", None], {"/a": 1})
    ],
    "host_memory": [
        ("lots", f"host_memory: cannot read 'lots' as a size; {_SIZE} 'auto' or 'min'"),
        (1.5, f"host_memory: cannot read 1.5 as a size; {_SIZE} 'auto' or 'min'"),
        (True, f"host_memory: cannot read True as a size; {_SIZE} 'auto' or 'min'"),
        (-1, "host_memory: a size cannot be negative, got -1; or 'auto' or 'min'"),
    ],
    "device_memory": [("min", f"device_memory: cannot read 'min' as a size; {_SIZE} 'auto'")],
    "units": [(value, f"units={value!r} is unknown; it may be 'auto' or class names of modules") for value in (3, [3])],
    "min_unit_numel": [
        (value, f"min_unit_numel={value!r} is no number of elements from 0") for value in (-1, "1M", True, 1.0)
    ],
    "activations": [("none", "activations='none' is unknown; it may be 'auto', 'recompute', 'keep'")],
    "overlap": [(value, f"overlap={value!r} is unknown; it may be 'auto', 'off'") for value in (True, "on", None)],
    "update": [("fused", "update='fused' is unknown; it may be 'auto', 'native', 'torch'")],
    "state": [("int4", "state='int4' is unknown; it may be 'auto', 'fp32', 'split', 'bf16', 'int8'")],
    "master": [("bf16", "master='bf16' is unknown; it may be 'auto', 'param', 'fp32'")],
    "window": [
        (value, f"window={value!r} is unknown; it may be 'auto' or a number of units from 1") for value in (0, True)
    ],
    "prefetch_batch": [("2", "prefetch_batch='2' is unknown; it may be 'auto' or a number of units from 1")],
    "verify_reads": [
        (value, f"verify_reads={value!r} is unknown; it may be True, False, 'auto'") for value in ("yes", 1)
    ],
    "io": [({"depth": 3}, "io={'depth': 3} is unknown; it may be a lightning_ssd.IOOptions(...)")],
    "keep_store": [(value, f"keep_store={value!r} is unknown; it may be True, False") for value in ("no", 0)],
    "checkpoint": [("directory", "checkpoint='directory' is unknown; it may be 'auto', 'file', 'links'")],
}
NAMES = [field.name for field in fields(Options)]
PRECISION = SimpleNamespace(param_dtype=None, keeps_master=False, master_dtype="auto", precision="32-true")


def resolve(device: str = "cpu", precision: Any = PRECISION, **options: Any) -> Settings:
    options = {"nvme_path": "/somewhere"} | options
    return Settings.resolve(
        Options(**options), default_root="/root-dir", device=torch.device(device), precision=precision
    )


def test_every_option_is_tested_here() -> None:
    assert list(VALID) == list(INVALID) == NAMES


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALID.items() for value in values])
def test_valid(name: str, value: Any) -> None:
    assert getattr(Options(**{name: value}), name) is value


@pytest.mark.parametrize(
    ("name", "value", "message"), [(name, *case) for name, cases in INVALID.items() for case in cases]
)
def test_invalid(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Options(**{name: value})
    assert str(raised.value) == message


def test_options_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Options().window = 3  # type: ignore[misc]


def test_the_constructor_takes_the_options() -> None:
    """It repeats them, for editors and type checkers; nothing may differ."""
    parameters = inspect.signature(StrategyMixin.__init__).parameters
    hints, expected = get_type_hints(StrategyMixin.__init__), get_type_hints(Options)
    keywords = {name: p.default for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert list(keywords) == NAMES
    assert keywords == {field.name: field.default for field in fields(Options)}
    assert {name: hints[name] for name in NAMES} == expected


def test_the_strategy_has_the_documentation_of_the_options() -> None:
    assert argument_docs() in (lightning_ssd.SSDOffloadStrategy.__doc__ or "")
    assert len(argument_docs()) > 1000


def test_defaults_come_to() -> None:
    settings = resolve()
    assert settings.roots == ["/somewhere"]
    assert settings.budget_nbytes is not None
    assert 0 < settings.budget_nbytes < available_nbytes()
    assert (settings.device_nbytes, settings.window_size, settings.prefetch_size) == (None, None, 1)
    assert settings.is_overlapped
    assert settings.verify == kernels.is_native()
    assert not settings.is_autocast


def test_options_come_to() -> None:
    settings = resolve(
        "cuda", host_memory="1MiB", device_memory="2KiB", window=4, prefetch_batch=2, overlap="off", verify_reads=True
    )
    assert (settings.budget_nbytes, settings.device_nbytes) == (1 << 20, 2048)
    assert (settings.window_size, settings.prefetch_size) == (4, 2)
    assert not settings.is_overlapped
    assert settings.verify
    assert resolve(host_memory="min").budget_nbytes is None


def test_the_precision_says_dtype_master_and_autocast() -> None:
    precision = SimpleNamespace(
        param_dtype=torch.bfloat16, keeps_master=True, master_dtype="auto", precision="bf16-mixed"
    )
    settings = resolve(precision=precision)
    assert (settings.param_dtype, settings.keep_master, settings.is_autocast) == (torch.bfloat16, True, True)
    assert not resolve(precision=precision, master="param").keep_master
    assert resolve(master="fp32").keep_master
    precision.master_dtype = "fp32"
    assert resolve(precision=precision, master="fp32").keep_master
    with pytest.raises(ConfigurationError, match="master='param' of the strategy contradicts master_dtype='fp32' of"):
        resolve(precision=precision, master="param")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_memory": "4096TiB"}, "host_memory='4096TiB' is 4503599627370496 bytes, this process can take"),
        ({"device_memory": "8GiB"}, "device_memory='8GiB' bounds the memory of a GPU.*leave device_memory at 'auto'"),
        ({"nvme_path": ["/a", "/b/../a"]}, "names a directory twice"),
        ({"nvme_path": "s3://a"}, "is a URL"),
    ],
)
def test_what_this_machine_cannot_honour(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve(**options)


def test_a_store_in_memory_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="nvme_path='/dev/shm/x' is on tmpfs, which is in memory"):
        resolve(nvme_path="/dev/shm/x")
