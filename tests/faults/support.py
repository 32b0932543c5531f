"""Runs that must fail with one clear sentence, and what must still be true afterwards."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.helpers.models import GPT
from tests.helpers.training import Result, train

small_gpt = functools.partial(GPT, width=16, layers=2)


def streamed(**kwargs: Any) -> SSDOffloadStrategy:
    return SSDOffloadStrategy(**({"host_memory": "min", "min_unit_numel": 0} | kwargs))


def refused(
    tmp_path: Path,
    strategy: Any,
    *parts: str,
    error: type[BaseException] | tuple[type[BaseException], ...] = Exception,
    make_net: Callable[[], nn.Module] = small_gpt,
    **kwargs: Any,
) -> BaseException:
    """Train; it must fail with one error that holds every one of ``parts``, and leave no file."""
    with pytest.raises(error) as raised:
        train(tmp_path, make_net, strategy, max_steps=2, **kwargs)
    text = str(raised.value)
    missing = [part for part in parts if not re.search(part, text)]
    assert not missing, text
    return raised.value


def finish_backward() -> None:
    """After a backward that failed, torch keeps the nodes it had not run until the next backward of the thread."""
    torch.ones(1, requires_grad=True).sum().backward()


def run_directories(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if "ssd-run-" in name] if root.is_dir() else []


def works(tmp_path: Path, **kwargs: Any) -> Result:
    """A correct run, here and now: two steps, finite losses."""
    result = train(tmp_path, small_gpt, streamed(), max_steps=2, **kwargs)
    assert len(result.losses) == 2
    return result
