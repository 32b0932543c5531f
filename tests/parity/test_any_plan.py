"""Whatever the plan keeps, queues and caches, and in whatever order threads run: the bits are those of plain Lightning.

Plans are drawn at random from those that a budget could give, and both threads are delayed at random places.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_ssd.optim.pipeline import UpdatePipeline
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from lightning_ssd.units.param_cache import ParamCache
from tests.helpers.models import GPT, FunctionalTie, ViT
from tests.helpers.plans import choose_plan
from tests.helpers.training import Images, Tokens, assert_equal, train

MODELS: list[tuple[Callable[[], nn.Module], Callable[[], Any]]] = [
    (GPT, lambda: Tokens(400)),
    (functools.partial(GPT, tie=True, dropout=0.1), lambda: Tokens(400)),
    (FunctionalTie, lambda: Tokens(400)),
    (ViT, lambda: Images(400)),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"gradient_clip_val": 0.5},
    {"accumulate_grad_batches": 2},
    {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed"},
    {"precision": "bf16-mixed"},
]


def random_choices(rng: random.Random, draft: Any) -> dict[str, Any]:
    names = [unit.name for unit in draft.units]
    some = rng.choice([0.0, 0.3, 1.0])
    return {
        "num_queued": rng.choice([0, 1, 1, 2, 9]),
        "keep_cache": rng.random() < 0.5,
        "in_memory_grads": rng.random() < 0.5,
        "in_memory_params": {name for name in names if rng.random() < some},
        "in_memory_states": {name for name in names if rng.random() < some},
    }


def delayed(rng: random.Random, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.005)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("seed", range(10))
def test_any_plan_and_any_order_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    make_net, data = MODELS[seed % len(MODELS)]
    options = OPTIONS[seed % len(OPTIONS)] | {"max_steps": 12, "validate": seed % 2 == 0, "val_check_interval": 5}
    if not options["validate"]:
        del options["val_check_interval"]
    options |= {"limit_val_batches": 2}
    update = rng.choice(["torch", "native"])
    settings: dict[str, Any] = {"activations": rng.choice(["recompute", "keep"]), "window": rng.choice(["auto", 1, 3])}

    def run(**more: Any) -> Any:
        strategy = SSDOffloadStrategy(min_unit_numel=rng.choice([0, 1000]), update=update, **settings, **more)
        return train(tmp_path, make_net, strategy, data=data(), **options)

    # The native rules have the bits of torch's loops only on some machines: their reference is the slow way.
    if update == "torch":
        expected = train(tmp_path, make_net, data=data(), **options)
    else:
        expected = run(host_memory="min", overlap="off")
    choose_plan(monkeypatch, lambda draft: random_choices(rng, draft))
    monkeypatch.setattr(UpdatePipeline, "update", delayed(rng, UpdatePipeline.update))
    for name in ("fetch", "release", "updated"):
        monkeypatch.setattr(ParamCache, name, delayed(rng, getattr(ParamCache, name)))
    found = run(host_memory="1GiB")
    assert_equal(expected, found)
    assert expected.val_losses == found.val_losses
