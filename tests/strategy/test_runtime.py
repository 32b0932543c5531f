"""What streams a model is whole once it is made, and nothing is left of one that could not be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ssd import SSDOffloadStrategy
from lightning_ssd.session import runtime as runtime_module
from lightning_ssd.step.module_hooks import is_streamed
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


def test_hooks_go_whatever_the_last_step_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(hooks: runtime_module.ModuleHooks) -> None:
        if is_over:
            raise ZeroDivisionError("the last write")

    close, is_over = runtime_module.ModuleHooks.close, False

    def close_and_fail(hooks: runtime_module.ModuleHooks) -> None:
        nonlocal is_over
        is_over = True
        close(hooks)

    monkeypatch.setattr(runtime_module.ModuleHooks, "end_step", fail)
    monkeypatch.setattr(runtime_module.ModuleHooks, "close", close_and_fail)
    strategy = SSDOffloadStrategy(host_memory="min")
    with pytest.raises(ZeroDivisionError, match="the last write"):
        train(tmp_path, GPT, strategy)
    assert not is_streamed(strategy.lightning_module)
