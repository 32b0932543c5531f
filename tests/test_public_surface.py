"""What users may rely on by name. A new option needs a line here, and the sentence why it cannot be derived."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest

import lightning_ssd
from lightning_ssd.io.engine import IOOptions

NAMES = ["IOOptions", "SSDOffloadPrecision", "SSDOffloadStrategy", "SSDOffloadTrace", "__version__", "gathered"]

# Name and default of each argument of the strategy, in order; those of Lightning's own strategies first.
POSITIONAL = ["accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"]
OPTIONS = {
    "nvme_path": None,
    "host_memory": "auto",
    "device_memory": "auto",
    "units": "auto",
    "min_unit_numel": 1_000_000,
    "activations": "auto",
    "overlap": "auto",
    "update": "auto",
    "state": "auto",
    "master": "auto",
    "window": "auto",
    "prefetch_batch": "auto",
    "verify_reads": "auto",
    "io": IOOptions(),
    "keep_store": False,
    "checkpoint": "auto",
}
IO_OPTIONS = {
    "engine": "auto",
    "depth": 16,
    "block_nbytes": "4MiB",
    "num_threads": 4,
    "direct": "auto",
    "deadline_s": 120.0,
}
TRACE_OPTIONS = {"path": inspect.Parameter.empty, "first_step": 2, "num_steps": 1}


@pytest.fixture(scope="module")
def parameters() -> dict[str, inspect.Parameter]:
    """The strategy's arguments, by name."""
    return dict(inspect.signature(lightning_ssd.SSDOffloadStrategy).parameters)


def test_public_names() -> None:
    assert lightning_ssd.__all__ == NAMES
    assert set(NAMES) <= set(dir(lightning_ssd))
    assert all(getattr(lightning_ssd, name) is not None for name in NAMES)
    assert re.match(r"\d", lightning_ssd.__version__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"lightning_ssd.*'ssd_offload'"):
        lightning_ssd.ssd_offload  # noqa: B018


def test_arguments_and_their_defaults(parameters: dict[str, inspect.Parameter]) -> None:
    assert {name: p.default for name, p in parameters.items()} == dict.fromkeys(POSITIONAL) | OPTIONS
    assert list(parameters) == [*POSITIONAL, *OPTIONS]


def test_options_are_keywords(parameters: dict[str, inspect.Parameter]) -> None:
    keyword_only = [name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keyword_only == list(OPTIONS)


def test_every_argument_is_documented(parameters: dict[str, inspect.Parameter]) -> None:
    documented = re.findall(r"^ {4}(\w+): \S", inspect.getdoc(lightning_ssd.SSDOffloadStrategy) or "", re.MULTILINE)
    assert documented == list(parameters)


def test_io_options_and_their_documentation() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(IOOptions)}
    assert defaults == IO_OPTIONS
    assert re.findall(r"^ {4}(\w+): \S", inspect.getdoc(IOOptions) or "", re.MULTILINE) == list(IO_OPTIONS)
    assert lightning_ssd.IOOptions is IOOptions


def test_trace_options_and_their_documentation() -> None:
    parameters = inspect.signature(lightning_ssd.SSDOffloadTrace).parameters
    assert {name: p.default for name, p in parameters.items()} == TRACE_OPTIONS
    documented = re.findall(r"^ {4}(\w+): \S", inspect.getdoc(lightning_ssd.SSDOffloadTrace) or "", re.MULTILINE)
    assert documented == list(TRACE_OPTIONS)


@pytest.mark.parametrize("defaults", [OPTIONS | {"io": None}, IO_OPTIONS], ids=["strategy", "io"])
def test_defaults_are_plain_json(defaults: dict[str, object]) -> None:
    assert json.loads(json.dumps(defaults)) == defaults


def test_making_one_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LightningCLI` makes strategies only to print their configuration."""
    monkeypatch.chdir(tmp_path)
    impossible = {"nvme_path": "/no/such/place", "host_memory": "1B", "units": ["NoSuchClass"]}
    assert lightning_ssd.SSDOffloadStrategy(**impossible, io=IOOptions(depth=-1)) is not None
    assert list(tmp_path.iterdir()) == []
