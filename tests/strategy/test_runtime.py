"""What streams a model is whole once it is made, and nothing is left of one that could not be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ssd import SSDOffloadStrategy
from lightning_ssd.strategy import runtime as runtime_module
from tests.helpers.models import GPT
from tests.helpers.training import train


@pytest.mark.parametrize("part", ["ModuleHooks", "ParamCache", "UpdatePipeline", "GradientStore"])
def test_the_cause_of_a_failed_setup_is_shown_whatever_its_end_fails_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("the cause")

    free = runtime_module.Runtime.free

    def free_and_fail(runtime: runtime_module.Runtime) -> None:
        free(runtime)
        raise ArithmeticError("at the end")

    monkeypatch.setattr(runtime_module, part, fail)
    monkeypatch.setattr(runtime_module.Runtime, "free", free_and_fail)
    with pytest.raises(ZeroDivisionError, match="the cause"):
        train(tmp_path, GPT, SSDOffloadStrategy(host_memory="min"))
